"""A model's process that dies under load: errors within seconds, and a launcher that ends."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import tritonclient.grpc as triton
from launched import kill, launched, server_of
from test_serve_draining import status
from triton_requests import until

from mmdit.errors import ServerError
from serve import processes
from serve.client import Client, Progress
from serve.launcher import running
from serve.ports import Ports

WITHIN = 6.0  # seconds; two to four were seen


def unary(url: str, steps: int) -> None:
    """A request that runs for seconds; raises InferenceServerException."""
    prompt = triton.InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"a circle"], object))
    count = triton.InferInput("steps", [1], "INT32")
    count.set_data_from_numpy(np.array([steps], np.int32))
    with triton.InferenceServerClient(url) as client:
        client.infer("text_to_image", [prompt, count])


@pytest.mark.parametrize("victim", ["denoiser", "mmdit", "text_encoder", "text_to_image_stream"])
def test_a_killed_process_fails_its_requests_and_ends_the_launch(build, fp8_repository, victim):
    """Unary requests and streams alike, within seconds; status 2 and one line that names the model."""
    with launched(build) as (process, ports):
        url = f"localhost:{ports.grpc}"
        server = server_of(process)
        regions = processes.regions(server)
        begun = threading.Barrier(5)
        ended: list[tuple[float, str]] = []

        def ask() -> None:
            begun.wait(30)
            try:
                unary(url, steps=200)
                ended.append((time.monotonic(), "a picture"))
            except triton.InferenceServerException as error:
                ended.append((time.monotonic(), str(error.status())))

        def watch() -> None:
            with Client(url) as client:
                stream = client.stream("a square", steps=200)
                assert isinstance(next(stream), Progress)
                begun.wait(30)
                try:
                    for _ in stream:
                        pass
                    ended.append((time.monotonic(), "a picture"))
                except ServerError:
                    ended.append((time.monotonic(), "error"))

        clients = [threading.Thread(target=each, daemon=True) for each in (ask, ask, watch, watch)]
        for each in clients:
            each.start()
        begun.wait(30)
        time.sleep(0.7)
        assert not ended, "too fast to have been killed under load"
        kill(f"/{victim}/1/model.py", session=server)
        killed = time.monotonic()
        for each in clients:
            each.join(killed + WITHIN - time.monotonic())
        assert len(ended) == 4, f"{4 - len(ended)} requests hang"
        assert not any(how == "a picture" for _, how in ended)
        output, _ = process.communicate(timeout=WITHIN)
        assert status(ports.http, "health/ready") != 200
    assert process.returncode == 2
    assert f"error: the process of model {victim} died" in output
    assert regions and not any(path.exists() for path in regions)
    ports.check_free()


def test_no_process_outlives_a_server_that_ended_by_itself(fp16_repository, tmp_path):
    """One that waits for an answer of its server does not see its end: here it is stopped."""
    with running(fp16_repository, Ports.free(), tmp_path / "server.log") as server:
        leader = server._process.pid
        models = {model: process for process, model in processes.model_processes(leader).items()}
        os.kill(models["text_to_image_stream"], signal.SIGSTOP)
        os.kill(leader, signal.SIGKILL)
        server._process.wait()
        assert models["text_to_image_stream"] in processes.model_processes(leader)
    until(lambda: processes.model_processes(leader) == {})
