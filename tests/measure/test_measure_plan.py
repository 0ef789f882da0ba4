"""A plan's timing and inspection, against stand-ins that know TensorRT's real names alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from measure_samples import PROFILES, TEN
from tensorrt_stand_in import VERSIONS, real_bindings, stand_in, told_by

from measure.plan import Job, measured, points
from mmdit.artifact import Manifest, whole
from mmdit.errors import EngineError


def test_each_shape_is_timed_once_in_the_first_profile_that_takes_it() -> None:
    """The static profile has two rows; three are in the second alone, sixteen in none."""
    found = [(profile, shapes["latent"][0]) for profile, shapes in points(PROFILES, (1, 2, 3, 16))]
    assert found == [(0, 2), (1, 1), (1, 3), (1, 4)]


def run_scenarios(folder: Path) -> None:
    """In the child process: time a plan over stand-ins, print what TensorRT was told as JSON."""
    trt = real_bindings(folder)
    dtypes = {"latent": trt.DataType.HALF, "timestep": trt.DataType.FLOAT, "velocity": trt.DataType.HALF}
    names, shapes, told = list(dtypes), {}, {"calls": 0, "addresses": set(), "profiles": []}

    def execute(stream: int) -> bool:
        told["calls"] += 1
        return bool(shapes["latent"][0] != 3)

    context = stand_in(
        trt.IExecutionContext,
        set_optimization_profile_async=lambda profile, stream: told["profiles"].append(profile) or True,
        set_input_shape=lambda name, shape: (
            shapes.update({name: shape, "velocity": shapes.get("latent")}) or True
        ),
        get_tensor_shape=lambda name: shapes["latent"] if name == "velocity" else shapes[name],
        set_tensor_address=lambda name, memory: told["addresses"].add(memory) or True,
        execute_async_v3=execute,
    )
    inspector = stand_in(trt.EngineInspector, get_engine_information=json.dumps({"Layers": TEN}))
    engine = stand_in(
        trt.ICudaEngine,
        num_io_tensors=3,
        get_tensor_name=lambda index: names[index],
        get_tensor_dtype=lambda name: dtypes[name],
        create_execution_context=context,
        create_engine_inspector=inspector,
    )
    runtime = stand_in(trt.Runtime, deserialize_cuda_engine=engine)
    trt.Runtime = lambda logger: runtime
    trt.init_libnvinfer_plugins = lambda logger, namespace: True
    settings = {"component": "mmdit", "precision": "fp8", "runtime": "tensorrt", "profiles": PROFILES}
    manifest = Manifest(kind="engine", checkpoint="one", made_from={}, settings=settings, versions={})
    with whole(folder / "mmdit-fp8", manifest) as partial:
        (partial / "model.plan").write_bytes(b"a plan")
    job = Job(folder=folder / "mmdit-fp8", rows=(1,), layers=folder / "layers.json", device="cpu")
    found: dict[str, Any] = {"lines": list(measured(job))}
    found |= {"profiles": told["profiles"], "addresses": len(told["addresses"]), "calls": told["calls"]}
    found |= {"inspected": inspector.execution_context is context, "version": trt.__version__}
    try:
        list(measured(job.model_copy(update={"rows": (3,)})))
    except EngineError as error:
        found["refused"] = str(error)
    print(json.dumps(found))


@pytest.fixture(scope="module", params=VERSIONS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told_by(request.param, "test_measure_plan", tmp_path_factory.mktemp("tensorrt"))


def test_a_plan_is_timed_at_each_point_with_names_that_tensorrt_has(told: dict[str, Any]) -> None:
    """Usual shapes of both profiles, and one row in the second; every tensor has an address of its own."""
    rows = [(line["profile"], line["shapes"]["latent"][0]) for line in told["lines"][:-1]]
    assert rows == [(0, 2), (1, 1), (1, 4)] and told["profiles"][:3] == [0, 1, 1]
    assert all(line["milliseconds"]["median"] > 0 for line in told["lines"][:-1])
    assert told["calls"] >= 3 * 8


def test_a_plans_layers_are_inspected_at_known_shapes(told: dict[str, Any]) -> None:
    assert told["inspected"] and told["lines"][-1]["summary"]["attention_fused"] == {"fp16": 1}
    assert told["lines"][-1]["plan_bytes"] == len("a plan")


def test_a_call_that_tensorrt_refuses_ends_with_its_component(told: dict[str, Any]) -> None:
    assert "mmdit" in told["refused"] and "refused the call" in told["refused"]
