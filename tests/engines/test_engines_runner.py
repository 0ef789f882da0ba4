"""Engines run from Python: ONNX files for real, plans through the real Polygraphy over stand-ins.

A child loads TensorRT's real bindings (tests/support/tensorrt_stand_in.py). CUDA's memory is the host's
there, and the execution context writes what it was given.
"""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_stand_in import VERSIONS, real_bindings, stand_in, told_by
from tiny_model import save_source

from engines.__main__ import main
from engines.runner import runner
from mmdit.artifact import Layout, Manifest, whole
from mmdit.contract import COMPONENTS, Precision
from mmdit.errors import ArtifactError, EngineError

PROFILES = [
    {"input_ids": [[1, 77], [1, 77], [2, 77]]},
    {"input_ids": [[3, 77], [4, 77], [8, 77]]},
]


class HostMemory:
    """Polygraphy's CUDA wrapper, with the host's memory in the GPU's place."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.streams = 0

    def malloc(self, nbytes: int) -> int:
        buffer = ctypes.create_string_buffer(max(nbytes, 1))
        self.held[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, ptr: int) -> None:
        self.held.pop(ptr, None)

    def memcpy(self, dst: int, src: int, nbytes: int, kind: int, stream_ptr: Any = None) -> None:
        ctypes.memmove(dst, src, nbytes)

    def create_stream(self) -> int:
        self.streams += 1
        return 1

    def stream_synchronize(self, ptr: int) -> None:
        pass

    def destroy_stream(self, ptr: int) -> None:
        self.streams -= 1


def plan_folder(folder: Path, **options: bool) -> Path:
    """An engine's folder as the engines stage writes it, of CLIP-L with two profiles."""
    manifest = Manifest(
        kind="engine",
        checkpoint="one",
        made_from={},
        settings={
            **{"component": "clip_l", "precision": "fp16", "runtime": "tensorrt"},
            "profiles": PROFILES,
            "options": options,
        },
        versions={},
    )
    with whole(folder / "clip_l-fp16", manifest) as partial:
        (partial / "model.plan").write_bytes(b"a plan")
    return folder / "clip_l-fp16"


def run_scenarios(folder: Path) -> None:
    """In the child process: run a plan in several ways, print what TensorRT was told as JSON."""
    trt = real_bindings(folder)
    from polygraphy.cuda import cuda

    memory = cuda.G_CUDA = HostMemory()
    tensors = {"input_ids": trt.DataType.INT64, "pooled": trt.DataType.HALF}
    names, shapes, allocators, addresses = list(tensors), {}, {}, {}

    def execute(stream: int) -> bool:
        """Answer with the input's first column, as FP16."""
        rows, width = shapes["input_ids"]
        given = np.frombuffer(ctypes.string_at(addresses["input_ids"], rows * width * 8), np.int64)
        answer = given.reshape(rows, width)[:, :3].astype(np.float16)
        at = allocators["pooled"].reallocate_output("pooled", 0, answer.nbytes, 1)
        allocators["pooled"].notify_shape("pooled", answer.shape)
        ctypes.memmove(at, answer.ctypes.data, answer.nbytes)
        return True

    context = stand_in(
        trt.IExecutionContext,
        active_optimization_profile=0,
        get_tensor_shape=lambda name: shapes.get(name),
        set_input_shape=lambda name, shape: shapes.update({name: tuple(shape)}) or True,
        get_tensor_address=lambda name: addresses.get(name, 0),
        set_tensor_address=lambda name, memory: addresses.update({name: memory}) or True,
        set_output_allocator=lambda name, output_allocator: (
            allocators.update({name: output_allocator}) or True
        ),
        execute_async_v3=execute,
        set_optimization_profile_async=True,
        set_all_tensors_debug_state=True,
        set_debug_listener=True,
    )
    engine = stand_in(
        trt.ICudaEngine,
        num_io_tensors=2,
        get_tensor_name=lambda index: names[index],
        get_tensor_mode=lambda name: getattr(trt.TensorIOMode, "INPUT" if name == "input_ids" else "OUTPUT"),
        get_tensor_dtype=lambda name: tensors[name],
        get_tensor_shape=lambda name: (-1, 77 if name == "input_ids" else 3),
        get_tensor_format=trt.TensorFormat.LINEAR,
        is_shape_inference_io=False,
        **(
            {"get_aliased_input_tensor": None} if hasattr(trt.ICudaEngine, "get_aliased_input_tensor") else {}
        ),
        create_execution_context=context,
        streamable_weights_size=1000,
        get_weight_streaming_automatic_budget=400,
        weight_streaming_budget_v2=1000,
    )
    plans = []
    runtime = stand_in(trt.Runtime, deserialize_cuda_engine=lambda buffer: plans.append(buffer) or engine)
    trt.Runtime = lambda logger: runtime
    trt.init_libnvinfer_plugins = lambda logger, namespace: True

    found: dict[str, Any] = {"version": trt.__version__}
    plan = plan_folder(folder)
    with runner(plan) as run:
        small = np.arange(2 * 77).reshape(2, 77)
        first = run({"input_ids": small})["pooled"]
        second = run({"input_ids": small + 1000})["pooled"]
        found["answers"] = [first.tolist(), second.tolist(), str(first.dtype)]
        profile = context.set_optimization_profile_async
        found["profiles before"] = len(profile.call_args_list)
        run({"input_ids": np.zeros((4, 77), np.int64)})
        found["profiles after"] = [call.args[0] for call in profile.call_args_list]
        try:
            run({"input_ids": np.zeros((9, 77), np.int64)})
        except EngineError as error:
            found["too many rows"] = str(error)
        try:
            run({"input_ids": np.zeros((2, 77), np.float32)})
        except EngineError as error:
            found["wrong dtype"] = str(error)
        found["streams inside"] = memory.streams
    found["streams after"] = memory.streams
    found["plans"] = [bytes(each).decode() for each in plans]

    found["budget"] = [engine.weight_streaming_budget_v2]
    with runner(plan_folder(folder / "streaming", weight_streaming=True)):
        found["budget"].append(engine.weight_streaming_budget_v2)
    try:
        with runner(plan_folder(folder / "stripped", strip=True)):
            pass
    except EngineError as error:
        found["stripped"] = str(error)

    runtime.deserialize_cuda_engine.side_effect = lambda buffer: None
    try:
        with runner(plan):
            pass
    except EngineError as error:
        found["not loaded"] = str(error)
    print(json.dumps(found))


@pytest.fixture(scope="module", params=VERSIONS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told_by(request.param, "test_engines_runner", tmp_path_factory.mktemp("tensorrt"))


def test_a_plan_gets_its_inputs_and_its_outputs_outlive_the_next_call(told: dict[str, Any]) -> None:
    """Polygraphy writes each call's outputs into the same buffers."""
    assert told["plans"][0] == "a plan"
    assert told["answers"] == [[[0, 1, 2], [77, 78, 79]], [[1000, 1001, 1002], [1077, 1078, 1079]], "float16"]


def test_the_profile_that_takes_the_shapes_is_chosen(told: dict[str, Any]) -> None:
    """TensorRT starts with profile 0; only another one is set."""
    assert told["profiles before"] == 0
    assert told["profiles after"] == [1]


def test_shapes_that_no_profile_takes_are_refused_with_the_profiles(told: dict[str, Any]) -> None:
    assert told["too many rows"].startswith(
        "clip_l: no optimization profile of the engine takes {'input_ids': [9"
    )


@pytest.mark.parametrize(("failure", "words"), [("wrong dtype", "cannot run"), ("not loaded", "cannot load")])
def test_what_tensorrt_refuses_is_an_error_with_its_words(
    told: dict[str, Any], failure: str, words: str
) -> None:
    assert told[failure].startswith("clip_l: TensorRT " + words), told[failure]
    assert "\n" not in told[failure]


def test_a_plan_built_for_it_streams_what_the_gpu_has_no_room_for(told: dict[str, Any]) -> None:
    """Without a budget TensorRT loads all weights."""
    assert told["budget"] == [1000, 400]


def test_a_plan_without_weights_is_refused_with_the_command_that_gives_it_some(told: dict[str, Any]) -> None:
    assert "has no weights: run `python -m engines refit` first" in told["stripped"]


def test_leaving_the_runner_gives_the_gpu_back(told: dict[str, Any]) -> None:
    assert (told["streams inside"], told["streams after"]) == (1, 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """The engines of tiny graphs for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("tiny")
    for component in COMPONENTS:
        save_source(folder, component)
    main(["build", "--model", "tiny", "--build", str(folder), "--target", "cpu", "--precision", "fp16"])
    return Layout("tiny", folder)


def test_an_onnx_engine_gives_the_answers_of_onnx_runtime_by_name(tiny: Layout) -> None:
    """With any number of rows."""
    import onnxruntime

    folder = tiny.engine("cpu", "clip_l", Precision.FP16)
    ids = np.arange(3 * 77).reshape(3, 77) % 4
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    with runner(folder) as run:
        found = run({"input_ids": ids})
    assert found.keys() == {"hidden", "pooled"}
    for name, value in found.items():
        np.testing.assert_array_equal(value, session.run([name], {"input_ids": ids})[0])


def test_an_onnx_engine_refuses_what_it_cannot_run_and_names_itself(tiny: Layout) -> None:
    with (
        runner(tiny.engine("cpu", "clip_l", Precision.FP16)) as run,
        pytest.raises(EngineError, match="^clip_l: ONNX Runtime cannot run .*model.onnx"),
    ):
        run({"input_ids": np.zeros((1, 77), np.float32)})


def test_a_folder_without_an_engine_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="is not there yet: run `make engines` first"),
        runner(tmp_path / "x"),
    ):
        pass
