"""The container and the compose file, as far as they can be checked without Docker."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tensorrt_stand_in import libnvinfer

from mmdit.shapes import NAMES, shape_set
from serve.launcher import EXIT_TIMEOUT
from serve.ports import Ports
from serve.response_cache import ResponseCache
from serve.server_memory import shared_memory

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
COMPOSE = (ROOT / "deploy/compose.yaml").read_text()
README = (ROOT / "deploy/README.md").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]
OURS = {name: service for name, service in SERVICES.items() if name != "redis"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) in order, comments dropped and continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage → its instructions; "" holds what stands before the first."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    for word, rest in instructions():
        if word == "FROM":
            found[rest.split(" AS ")[1]] = []
        list(found.values())[-1].append((word, rest))
    return found


def default(value: str) -> str:
    """A compose value with each variable's default in its place."""
    return re.sub(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)\}", lambda found: found[2] or found[1], value)


def size_of(text: str) -> int:
    """A size as Docker writes it, in bytes."""
    number, unit = re.fullmatch(r"(\d+)([kmg])b?", text).groups()
    return int(number) << {"k": 10, "m": 20, "g": 30}[unit]


def test_the_dockerfile_is_made_of_known_instructions_in_an_order_that_docker_takes():
    """Stages start FROM an image or an earlier stage; JSON forms are JSON, and RUNs parse as shell."""
    known = {"ARG", "FROM", "WORKDIR", "RUN", "COPY", "EXPOSE", "HEALTHCHECK", "CMD"}
    assert {word for word, _ in instructions()} <= known
    assert [word for word, _ in stages()[""]] == ["ARG"]
    names: list[str] = []
    for name, steps in list(stages().items())[1:]:
        image, given = re.fullmatch(r"(\S+) AS (\w+)", steps[0][1]).groups()
        assert given == name and (image in names or image.startswith("nvcr.io/nvidia/tritonserver:"))
        names.append(name)
        assert [word for word, _ in steps].count("CMD") == (name != "base")
        for word, rest in steps:
            if word == "RUN":
                subprocess.run(["bash", "-n", "-c", rest], check=True)
            if word == "CMD":
                assert all(isinstance(part, str) for part in json.loads(rest))
            if word == "HEALTHCHECK":
                assert json.loads(rest[rest.index("CMD") + 3 :])[0] == "curl"
    assert names == ["base", "build", "serve"]


def test_the_base_images_release_and_tensorrt_are_arguments():
    """No version is written down: they must fit each other, and the operator's fleet."""
    assert "nvcr.io/nvidia/tritonserver:${TRITON}-py3" in DOCKERFILE
    assert 'tensorrt==${TENSORRT}"' in DOCKERFILE
    for word, rest in instructions():
        if word == "ARG":
            assert "=" not in rest


def test_every_build_argument_is_used_and_given():
    """Within its stage; the compose file gives each, and no other."""
    for name, steps in stages().items():
        for index, (word, argument) in enumerate(steps):
            if word == "ARG" and name:
                rest = " ".join(text for _, text in steps[index + 1 :])
                assert f"${{{argument}}}" in rest or argument.startswith("PIP_")  # pip reads its own
    for name, service in OURS.items():
        stage = service["build"]["target"]
        declared = {argument for key in ("", stage) for word, argument in stages()[key] if word == "ARG"}
        assert set(service["build"]["args"]) == declared, name


def test_every_copied_path_is_there():
    for word, rest in instructions():
        if word == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources), rest
    context = SERVICES["build"]["build"]["context"]
    assert (ROOT / "deploy" / context).resolve() == ROOT
    assert all((ROOT / service["build"]["dockerfile"]).is_file() for service in OURS.values())


def test_the_build_image_leaves_out_what_is_generated():
    """What git ignores and Docker would copy: artifacts of gigabytes, the environment of another machine."""
    ignored = (ROOT / "deploy/Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv", "build", "training*"} <= set(ignored)


def test_neither_the_token_nor_the_checkpoints_reach_the_image_or_git():
    """deploy/.env holds HF_TOKEN, and deploy/checkpoints is the default of CHECKPOINTS: tens of GB."""
    assert "- ${CHECKPOINTS:-./checkpoints}:" in COMPOSE
    docker = (ROOT / "deploy/Dockerfile.dockerignore").read_text().split()
    assert {"**/.env", "deploy/checkpoints"} <= set(docker)
    git = (ROOT / ".gitignore").read_text().split()
    assert {".env", "/deploy/checkpoints/"} <= set(git)


def test_the_build_images_environment_is_newer_than_what_make_compares_it_with():
    """Else `make` sets up again in every container, without the index and perhaps without a network."""
    steps = stages()["build"]
    assert steps.index(("RUN", "touch .venv/.ready")) > steps.index(("COPY", ". ."))


def test_a_refusal_is_not_tried_for_ever():
    """The launcher ends with status 2, which Docker takes for a failure as any other."""
    policy, _, times = SERVICES["server"]["restart"].partition(":")
    assert policy == "on-failure" and 0 < int(times) < 10


def test_the_commands_are_the_makefiles_and_the_launchers():
    """`make -n` knows the build job's target and variables; `launch` knows the server's options."""
    make = [default(part) for part in SERVICES["build"]["command"]]
    subprocess.run([*make, "-n"], cwd=ROOT, check=True, capture_output=True)
    variables = re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(), re.M)
    assert {part.split("=")[0] for part in make[2:]} <= set(variables)
    interpreter, *launch = (default(part) for part in SERVICES["server"]["command"])
    assert interpreter == ".venv/bin/python"
    shown = subprocess.run(
        [sys.executable, *launch[:3], "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(option.split("=")[0] in shown.stdout for option in launch[3:])


def test_the_ports_are_the_launchers_on_this_machine_alone():
    """As with `make serve`, nothing listens to the network unless somebody says so."""
    expected = {Ports().http, Ports().grpc, Ports().metrics}
    inside = set()
    for mapping in SERVICES["server"]["ports"]:
        address, outer, inner = default(mapping).split(":")
        assert address == "127.0.0.1" and outer == inner
        inside.add(int(inner))
    assert inside == expected
    assert {
        int(port) for word, rest in stages()["serve"] if word == "EXPOSE" for port in rest.split()
    } == inside
    assert f"localhost:{Ports().http}/v2/health/ready" in DOCKERFILE


def test_a_stop_gives_requests_in_flight_their_time():
    """They get the launcher's grace time, and Triton five seconds over its own; Docker must not be faster."""
    shown = subprocess.run(
        [sys.executable, "-m", "serve", "launch", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    grace = int(re.search(r"default:\s+(\d+)", shown.rpartition("--grace-seconds")[2])[1])
    assert int(SERVICES["server"]["stop_grace_period"].rstrip("s")) > grace + EXIT_TIMEOUT + 5


def test_the_redis_service_is_one_that_the_launcher_reaches_and_others_do_not():
    """By its name in the README; no port of it is published, and it starts only when it is asked for."""
    (named,) = set(re.findall(r"CACHE=(redis://\w+)", README))
    host, _ = ResponseCache.parse(named).redis
    assert SERVICES[host]["profiles"] == ["redis"]
    assert "ports" not in SERVICES[host]


@pytest.mark.parametrize("name", NAMES)
def test_the_compose_files_shared_memory_is_enough_for_large(large, name):
    """With every shape set, and the requests and streams that the policies admit."""
    policies = "".join(path.read_text() for path in ROOT.glob("model_repository/*/config.pbtxt"))
    limits = {
        key: int(re.search(rf'"{key}" value {{ string_value: "(\d+)"', policies)[1])
        for key in ("max_requests", "max_streams", "max_prompt_bytes")
    }
    needed = shared_memory(
        large,
        shape_set(large, name),
        "tensorrt",
        requests=limits["max_requests"],
        streams=limits["max_streams"],
        prompts=2 * limits["max_requests"] * limits["max_prompt_bytes"],
    )
    for service in OURS.values():
        assert size_of(default(service["shm_size"])) >= needed


def test_both_services_share_the_artifacts_and_have_one_gpu():
    """The build's volume, or BUILD's folder, is where the launcher looks: the image's build folder."""
    workdir = dict(instructions())["WORKDIR"]
    for service in OURS.values():
        assert f"${{BUILD:-artifacts}}:{workdir}/build" in service["volumes"]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_every_variable_of_the_compose_file_is_explained():
    """In the README's table or its .env file."""
    for name in set(re.findall(r"\$\{(\w+)", COMPOSE)):
        assert re.search(rf"\b{name}\b", README), name


def test_the_readmes_commands_parse():
    for block in re.findall(r"```\n(.*?)```", README, re.S):
        subprocess.run(["bash", "-n", "-c", block], check=True)
        for line in block.splitlines():
            if "compose" in line:
                words = shlex.split(line, comments=True)
                assert words[:4] == ["docker", "compose", "-f", "deploy/compose.yaml"]
                assert words[-1] in SERVICES


def test_the_serve_image_has_all_that_the_launcher_imports():
    """Its `client` packages, mmdit/, engines/ and serve/: no library that exports, builds or runs a graph."""
    code = """
import runpy, sys
sys.argv = ["serve", "launch", "--help"]
try:
    runpy.run_module("serve", run_name="__main__")
except SystemExit:
    pass
import serve.launcher, engines.tensorrt.server_settings
print(*{name.split(".")[0] for name in sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"torch", "onnx", "onnxruntime", "tokenizers", "polygraphy", "export"}
    assert {"numpy", "pydantic", "tritonclient", "mmdit", "engines", "serve"} <= loaded


@pytest.mark.parametrize(("builder", "status"), [("11.4.0.106", 0), ("11.4.1.7", 2), ("11.40.0.1", 2)])
def test_the_build_image_is_not_made_with_another_tensorrt(tmp_path, builder, status):
    """Compared with the libnvinfer of the Triton on PATH: hours of building would end in nothing."""
    backend = tmp_path / "backends/tensorrt"
    backend.mkdir(parents=True)
    (backend / "libtriton_tensorrt.so").write_bytes(b"\0libnvinfer.so.11\0")
    (backend / "libnvinfer.so.11").write_bytes(libnvinfer(110400))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/tritonserver").write_text("#!/bin/sh\n")
    (tmp_path / "bin/tritonserver").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "deploy.same_tensorrt", builder],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "11.4.0" in (done.stderr if status else done.stdout)
