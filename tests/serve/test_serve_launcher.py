"""The launcher and the command line: real processes, real ports, real signals."""

import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from launched import ROOT, kill, launch, launched, read_until, server_of
from PIL import Image

from mmdit.errors import ServerError
from serve import processes
from serve.client import Client
from serve.launcher import Server, running, serve
from serve.ports import Ports
from serve.response_cache import LOCAL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_launch_says_its_ports_serves_fp8_pictures_and_stops_cleanly(build, fp8_repository, tmp_path, number):
    """Ready means ready; Ctrl-C and SIGTERM end with status 0 and free the ports."""
    ports = Ports.free()
    process = launch(build, ports)
    try:
        said = read_until(process, "Ctrl-C stops it")
        for port in (ports.grpc, ports.http, ports.metrics):
            assert f"127.0.0.1:{port}" in said
        out = tmp_path / "picture.png"
        command = [
            sys.executable,
            "-m",
            "serve",
            "generate",
            "a red square",
            "--url",
            f"localhost:{ports.grpc}",
        ]
        done = subprocess.run(
            [*command, "--out", str(out), "--steps", "3", "--seed", "5"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"{out}: 128x128, seed 5" in done.stdout
        assert "denoising: 3/3 steps" in done.stderr
        with Image.open(out) as picture:
            assert picture.text["prompt"] == "a red square"
    finally:
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 0
    ports.check_free()


def test_a_killed_launcher_takes_its_server_along(build, fp8_repository):
    """SIGKILL leaves no server behind on the ports."""
    ports = Ports.free()
    process = launch(build, ports)
    read_until(process, "Ctrl-C stops it")
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            return ports.check_free()
        except ServerError:
            time.sleep(0.2)
    raise AssertionError("the server outlived its launcher by a minute")


def test_a_killed_server_ends_the_launch(build, fp8_repository):
    """Status 2 and one line, so that a supervisor starts it anew; its shared memory is gone."""
    with launched(build) as (process, ports):
        server = server_of(process)
        regions = processes.regions(server)
        kill("/bin/tritonserver", session=server)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(r"error: the Triton server was killed by signal 9 \(log: .*\)\n", output)
    assert regions and not any(path.exists() for path in regions)
    ports.check_free()


@pytest.mark.parametrize("name", ["grpc", "http", "metrics"])
def test_a_port_that_is_taken_is_named(fp16_repository, tmp_path, name):
    """Before anything starts, with the variable that chooses another."""
    ports = Ports.free()
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", getattr(ports, name)))
        taken.listen()
        with pytest.raises(ServerError, match=rf"port {getattr(ports, name)} .*{name.upper()}_PORT"):
            Server(fp16_repository, ports, tmp_path / "server.log")
    assert not (tmp_path / "server.log").exists()


def test_a_number_that_is_no_port_is_named(fp16_repository, tmp_path):
    """As are two ports that are the same."""
    with pytest.raises(ServerError, match="HTTP_PORT=99999 is no port"):
        Server(fp16_repository, Ports(8001, 99999, 8002), tmp_path / "server.log")
    with pytest.raises(ServerError, match="must differ"):
        Server(fp16_repository, Ports(8001, 8001, 8002), tmp_path / "server.log")


@pytest.mark.parametrize("grace", [-1, float("nan"), float("inf")])
def test_a_grace_time_that_is_none_is_refused_before_anything_starts(fp16_repository, tmp_path, grace):
    with pytest.raises(ServerError, match=f"the grace time is {grace:g} s"):
        serve(fp16_repository, Ports.free(), tmp_path / "server.log", cache=LOCAL, grace=grace)
    assert not (tmp_path / "server.log").exists()


def test_a_folder_that_is_no_repository_is_refused(tmp_path):
    """With the command that makes one."""
    with pytest.raises(ServerError, match="run `make repository` with this MODEL"):
        Server(tmp_path, Ports.free(), tmp_path / "server.log")


def test_a_model_that_does_not_load_ends_the_launch_with_the_logs_path(fp16_repository, tmp_path):
    """A damaged engine: the server's own reason, and where the rest is."""
    import shutil

    damaged = tmp_path / "repository"
    shutil.copytree(fp16_repository, damaged)
    (damaged / "t5/1/model.onnx").write_bytes(b"not an onnx file")
    with (
        pytest.raises(ServerError, match=r"(?s)ended with status 1.*server\.log"),
        running(damaged, Ports.free(), tmp_path / "server.log"),
    ):
        pass


def test_a_killed_engine_fails_its_requests_with_an_error(fp16_repository, tmp_path):
    """The MMDiT's process dies in the middle of a picture: that client and the next get an error, at once."""
    with (
        running(fp16_repository, Ports.free(), tmp_path / "server.log") as server,
        Client(f"localhost:{server.ports.grpc}") as client,
    ):
        stream = client.stream("a circle", steps=200)
        next(stream)
        kill("/mmdit/1/model.py", session=server._process.pid)
        with pytest.raises(ServerError, match="mmdit"):
            list(stream)
        with pytest.raises(ServerError, match="mmdit.* not healthy"):
            client.generate("a circle", steps=1, timeout=30)
        assert server.failure() == "the process of model mmdit died"
