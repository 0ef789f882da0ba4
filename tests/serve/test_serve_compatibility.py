"""The guard: plans that a server's TensorRT or GPU cannot load are refused before Triton starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from stand_in_plans import write_engines
from tensorrt_stand_in import libnvinfer

from engines.tensorrt import server_settings
from engines.tensorrt.compatibility import Plan, built_elsewhere, check_together, loadable
from mmdit.artifact import Layout, read_manifest
from mmdit.contract import Precision
from mmdit.errors import ArtifactError, RepositoryError, ServerError
from mmdit.shapes import shape_set
from mmdit.target import Gpu
from serve import launcher
from serve.engine_set import Engines
from serve.installation import Installation, find_installation
from serve.launcher import Server
from serve.ports import Ports
from serve.repository import package

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), "600.1", uuid="GPU-1234")
L40S = Gpu("NVIDIA L40S", (8, 9), "600.1")
PLAN = Plan(
    component="mmdit",
    target="hopper",
    file="mmdit/1/model.plan",
    bytes=16,
    compute_capability="9.0",
    tensorrt="11.4.0.106",
    version_compatible=False,
    gpu=H100.name,
    driver=H100.driver,
    made_from={},
)
ADA = PLAN.model_copy(update={"target": "ada", "compute_capability": "8.9", "file": "mmdit/1/ada.plan"})
COMPATIBLE = PLAN.model_copy(update={"version_compatible": True})


@pytest.fixture
def hopper(large, tmp_path) -> Layout:
    """SD3.5 Large's FP16 engines for Hopper."""
    layout = Layout("large", tmp_path / "build")
    write_engines(layout, large, shape_set(large, "square-1024"), precision=Precision.FP16)
    return layout


def packaged(layout: Layout) -> Path:
    """The repository of Hopper's FP16 engines."""
    output = layout.repository("hopper", Precision.FP16)
    package([Engines(layout, "hopper", Precision.FP16)], output)
    return output


@pytest.fixture
def triton(tmp_path, monkeypatch) -> Path:
    """A stand-in of NVIDIA's installation on PATH: it notes its arguments, its environment, and ends.

    Its TensorRT backend needs a libnvinfer of 11.4.0, which lies beside it; the GPU is the one that built.
    """
    folder = tmp_path / "tritonserver"
    backend = folder / "backends/tensorrt"
    backend.mkdir(parents=True)
    (backend / "libtriton_tensorrt.so").write_bytes(b"\x7fELF\0libnvinfer.so.11\0libcudart.so.13\0")
    (backend / "libnvinfer.so.11").write_bytes(libnvinfer(110400))
    (folder / "bin").mkdir()
    binary = folder / "bin/tritonserver"
    binary.write_text(f'#!/bin/sh\nenv > {folder}/environment\nprintf "%s\\n" "$@" > {folder}/arguments\n')
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}:/usr/bin:/bin")
    monkeypatch.setattr(server_settings, "find_gpu", lambda: replace(H100, name="a card of hopper"))
    return folder


def started(repository: Path, triton: Path) -> list[str]:
    """The arguments that a launch over the repository gives to Triton."""
    server = Server(repository, Ports.free(), triton / "server.log")
    server._process.wait()
    return (triton / "arguments").read_text().splitlines()


def not_started(repository: Path, triton: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Server(repository, Ports.free(), triton / "server.log")
    assert not (triton / "arguments").exists()


def test_the_version_is_the_librarys_own(triton):
    """Of the one that the backend names, asked in a child process: nothing is loaded into this one."""
    installation = find_installation(triton)
    assert installation.backends == triton / "backends"
    assert installation.tensorrt_version() == "11.4.0"
    (triton / "backends/tensorrt/libnvinfer.so.11").write_bytes(libnvinfer(101602))
    assert installation.tensorrt_version() == "10.16.2"
    assert "libnvinfer" not in Path("/proc/self/maps").read_text()


def test_a_library_that_is_not_beside_the_backend_is_found_as_the_loader_finds_it(triton, tmp_path):
    """In the server's environment, not the launcher's."""
    (triton / "backends/tensorrt/libnvinfer.so.11").rename(tmp_path / "libnvinfer.so.11")
    installation = find_installation(triton)
    with pytest.raises(ServerError, match=r"needs libnvinfer\.so\.11, which cannot be loaded"):
        installation.tensorrt_version()
    elsewhere = installation.environment | {"LD_LIBRARY_PATH": str(tmp_path)}
    assert replace(installation, environment=elsewhere).tensorrt_version() == "11.4.0"


def test_a_plan_loads_in_the_version_and_on_the_capability_that_built_it():
    """Of several targets' plans the present GPU's are taken."""
    assert loadable([ADA, PLAN], H100, "11.4.0") == [PLAN]
    assert loadable([ADA, PLAN], L40S, "11.4.0") == [ADA]


@pytest.mark.parametrize("server", ["11.3.0", "11.4.1", "10.16.2", "12.0.0"])
def test_a_plan_of_another_tensorrt_is_refused(server):
    with pytest.raises(ServerError, match=rf"TensorRT 11\.4\.0\.106, this server has {server}.*tensorrt=="):
        loadable([PLAN], H100, server)


@pytest.mark.parametrize(("server", "loads"), [("11.4.0", 1), ("11.9.0", 1), ("11.3.9", 0), ("12.0.0", 0)])
def test_a_version_compatible_plan_loads_in_later_versions_of_its_major_release(server, loads):
    if loads:
        assert loadable([COMPATIBLE], H100, server) == [COMPATIBLE]
    else:
        with pytest.raises(ServerError, match="later versions of the same major release"):
            loadable([COMPATIBLE], H100, server)


def test_a_plan_of_another_gpu_is_refused_with_what_there_is():
    with pytest.raises(ServerError, match=r"L40S has compute capability 8\.9.*plans for hopper \(9\.0\)"):
        loadable([PLAN], L40S, "11.4.0")
    with pytest.raises(ServerError, match=r"no NVIDIA GPU was found.*hopper \(9\.0\), ada \(8\.9\).*--gpus"):
        loadable([PLAN, ADA], None, "11.4.0")


def test_plans_of_two_tensorrts_are_not_served_together():
    """Unless both are version-compatible, within a major release."""
    older = PLAN.model_copy(update={"component": "t5", "tensorrt": "11.3.0.1"})
    with pytest.raises(RepositoryError, match=r"t5 for hopper was built with TensorRT 11\.3\.0\.1, mmdit"):
        check_together([PLAN, older])
    check_together([COMPATIBLE, older.model_copy(update={"version_compatible": True})])
    check_together([PLAN, ADA])


def test_two_names_of_one_gpu_are_one_too_many():
    with pytest.raises(RepositoryError, match=r"hopper and sm90 are the same GPUs"):
        check_together([PLAN, PLAN.model_copy(update={"target": "sm90"})])


def test_the_launcher_starts_a_repository_that_fits(hopper, triton):
    """With a CUDA pool, and without leave for plans to bring code along."""
    arguments = started(packaged(hopper), triton)
    (pool,) = (each for each in arguments if each.startswith("--cuda-memory-pool-byte-size=0:"))
    assert int(pool.split(":")[1]) >= 64 << 20
    assert not [each for each in arguments if "version-compatible" in each]


def test_triton_sees_the_gpu_that_was_looked_at_and_no_other(hopper, triton, monkeypatch):
    """CUDA counts the fastest first, NVML in PCI order: a number would be another GPU's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    started(packaged(hopper), triton)
    environment = (triton / "environment").read_text().splitlines()
    assert {"CUDA_DEVICE_ORDER=PCI_BUS_ID", "CUDA_VISIBLE_DEVICES=GPU-1234"} <= set(environment)


def test_a_plan_of_another_gpu_of_the_same_capability_is_served_with_a_warning(
    hopper, triton, monkeypatch, capsys
):
    """An H200 loads what an H100 built; an L4 what an L40S did."""
    monkeypatch.setattr(server_settings, "find_gpu", lambda: H100)
    started(packaged(hopper), triton)
    assert (
        "warning: " in (error := capsys.readouterr().err)
        and f"built on a card of hopper, here is {H100.name}: it loads, but it was tuned and judged there"
        in error
    )
    assert built_elsewhere([PLAN], H100) is None
    assert built_elsewhere([PLAN.model_copy(update={"gpu": "unknown"})], H100) is None


@pytest.mark.parametrize(
    "age",
    [
        lambda manifest: manifest["settings"].pop("plans"),
        lambda manifest: manifest["settings"]["plans"][0].pop("gpu"),
        lambda manifest: manifest["findings"].pop("cuda_pool_bytes"),
    ],
)
def test_a_repository_of_an_older_version_is_refused_with_the_way_out(hopper, triton, age):
    repository = packaged(hopper)
    manifest = json.loads((repository / "manifest.json").read_text())
    age(manifest)
    (repository / "manifest.json").write_text(json.dumps(manifest))
    match = "was packaged by an older version: run `make repository`"
    not_started(repository, triton, ServerError, match)


def test_a_version_compatible_repository_is_started_with_leave_for_it(large, tmp_path, triton):
    layout = Layout("large", tmp_path / "build")
    options = {"version_compatible": True}
    shapes = shape_set(large, "square-1024")
    write_engines(layout, large, shapes, precision=Precision.FP16, tensorrt="11.2.0.7", options=options)
    assert "--backend-config=tensorrt,version-compatible=true" in started(packaged(layout), triton)


def test_the_launcher_refuses_another_tensorrt_another_gpu_and_none(hopper, triton, monkeypatch):
    """Before Triton starts, with status 2 and the reason."""
    repository = packaged(hopper)
    library = triton / "backends/tensorrt/libnvinfer.so.11"
    library.write_bytes(libnvinfer(110300))
    not_started(
        repository, triton, ServerError, r"clip_l/1/model\.plan was built with TensorRT 11\.4\.0\.106"
    )
    library.write_bytes(libnvinfer(110400))
    monkeypatch.setattr(server_settings, "find_gpu", lambda: L40S)
    not_started(repository, triton, ServerError, "NVIDIA L40S has compute capability 8.9")
    monkeypatch.setattr(server_settings, "find_gpu", lambda: None)
    not_started(repository, triton, ServerError, "no NVIDIA GPU was found")


def test_the_wheels_server_says_that_it_has_no_tensorrt(hopper, tmp_path):
    """It names the container that has, and the target that it can serve."""
    with pytest.raises(ServerError, match=r"no TensorRT backend .*nvcr\.io/nvidia/tritonserver.*TARGET=cpu"):
        Server(packaged(hopper), Ports.free(), tmp_path / "server.log")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda plan: plan.write_bytes(plan.read_bytes()[:7]), r"has 7 bytes, expected 16"),
        (lambda plan: plan.write_bytes(b"another of 16 by"), "changed after it was written"),
        (lambda plan: plan.unlink(), "is gone"),
    ],
)
def test_a_plan_that_is_not_what_was_packaged_is_named(hopper, triton, damage, reason):
    """Truncated, exchanged, gone."""
    repository = packaged(hopper)
    plan = repository / "t5/1/model.plan"
    content = plan.read_bytes()
    plan.unlink()  # it is a hard link of the engine's
    plan.write_bytes(content)
    damage(plan)
    not_started(repository, triton, ArtifactError, rf"t5/1/model\.plan {reason}.*copy the repository again")


def test_little_shared_memory_is_warned_of_with_the_containers_option(hopper, triton, monkeypatch, capsys):
    """Docker's 64 MB; the server may still be meant for few requests."""
    repository = packaged(hopper)
    started(repository, triton)
    assert capsys.readouterr().err == ""
    usage = shutil.disk_usage("/")._replace(free=64 << 20)
    monkeypatch.setattr(launcher.shutil, "disk_usage", lambda _: usage)
    started(repository, triton)
    needed = read_manifest(repository).findings["shared_memory_bytes"] >> 20
    assert f"/dev/shm has 64 MiB free, and this repository takes up to {needed} MiB" in (
        error := capsys.readouterr().err
    )
    assert f"--shm-size={needed}m" in error


def test_a_backend_that_names_no_tensorrt_is_damaged(tmp_path):
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt/libtriton_tensorrt.so").write_bytes(b"")
    with pytest.raises(ServerError, match="names no libnvinfer"):
        Installation(["tritonserver"], {}, tmp_path, tmp_path).tensorrt_version()
