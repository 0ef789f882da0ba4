"""TensorRT's builder cannot run without a GPU, but its Python bindings can be loaded without TensorRT.

They need three shared libraries, which these tests write: they define the functions that the bindings
import, each of which returns null. A child process then builds with stand-ins that know only the
names and keywords of the real classes, through the real Polygraphy; the tests read what arrived.
"""

import json
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorrt_stand_in import VERSIONS, Stage, real_bindings, told_by
from tiny_model import FAMILY, SIGNATURES, save_source

from engines.source import Source
from engines.tensorrt.options import Options
from engines.tensorrt.plan_from_onnx import plan_from_onnx
from mmdit.artifact import Layout, read_manifest
from mmdit.contract import Precision
from mmdit.errors import EngineError
from mmdit.shapes import ShapeSet, SizeRange, shape_set
from mmdit.target import Gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), "580.95")
SMALL = SizeRange(min=(64, 64), opt=(128, 128), max=(256, 256), max_rows=12)
LARGE = SizeRange(min=(256, 256), opt=(256, 256), max=(256, 256), max_rows=4)
SHAPES = ShapeSet(name="two", multiple=16, ranges=(SMALL, LARGE))
OPTIONS = Options(workspace_gib=1.5, optimization_level=4)


def run_scenarios(folder: Path) -> None:
    """In the child process: build in several ways, print what TensorRT was told as JSON."""
    trt = real_bindings(folder)
    found: dict[str, Any] = {"version": trt.__version__}
    layout = Layout("tiny", folder / "build")
    sources = {}
    for component, precision in (("mmdit", Precision.FP8), ("clip_l", Precision.FP16)):
        save_source(folder / "build", component, precision)
        onnx_folder = layout.onnx(component, precision)
        sources[component] = Source(component, precision, onnx_folder, read_manifest(onnx_folder))

    def build(component: str = "mmdit", options: Options = OPTIONS, shapes: ShapeSet = SHAPES) -> Any:
        plan = folder / "model.plan"
        try:
            return plan_from_onnx(
                sources[component],
                plan,
                signature=SIGNATURES[component],
                shapes=shapes,
                options=options,
                timing_caches=folder / "timing-caches",
                gpu=H100,
            )
        except EngineError as error:
            return f"EngineError: {error}"
        except KeyboardInterrupt:
            return "KeyboardInterrupt"

    def said(text: str) -> None:
        from polygraphy.backend.trt import get_trt_logger

        get_trt_logger().log(trt.Logger.ERROR, text)

    def refused(kept: bytes) -> bool:
        if kept:
            said("[stdArchiveReader.cpp] Error Code 1: Serialization (Magic tag does not match)")
        return bool(kept)

    def out_of_memory() -> None:
        from polygraphy.backend.trt import get_trt_logger

        get_trt_logger().log(trt.Logger.WARNING, "weights were rounded")
        get_trt_logger().log(trt.Logger.ERROR, "[defaultAllocator] Cuda Runtime (out of memory)")

    found["nothing behind the bindings"] = build()

    stage = Stage(trt, "mmdit", lambda: b"a plan", SHAPES)
    found["findings"] = build()
    assert isinstance(found["findings"], dict), found["findings"]
    config = stage.config
    found["plan"] = (folder / "model.plan").read_text()
    found["caches"] = sorted(path.name for path in (folder / "timing-caches").glob("*.cache"))
    found["network flags"] = stage.builder.create_network.call_args.kwargs["flags"]
    found["strongly typed"] = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    found["parsed"] = [list(call.args) for call in stage.parser.parse_from_file.call_args_list]
    found["onnx"] = str(sources["mmdit"].onnx)
    found["profiles"] = [
        {call.args[0]: call.args[1:] for call in profile.set_shape.call_args_list}
        for profile in stage.profiles
    ]
    added = [call.args[0] for call in config.add_optimization_profile.call_args_list]
    found["profiles added"] = [stage.profiles.index(profile) for profile in added]
    found["pools"] = [[c.args[0].name, c.args[1]] for c in config.set_memory_pool_limit.call_args_list]
    found["level"] = config.builder_optimization_level
    found["verbosity"] = config.profiling_verbosity.name
    found["flags set"] = [call.args[0].name for call in config.set_flag.call_args_list]
    found["flags cleared"] = [call.args[0].name for call in config.clear_flag.call_args_list]
    found["first cache"] = [call.args[0].decode() for call in config.create_timing_cache.call_args_list]
    found["monitored"] = isinstance(config.progress_monitor, trt.IProgressMonitor)
    monitor = type(config.progress_monitor)
    found["monitor"] = {
        name: [
            re.findall(r"(\w+): ", getattr(trt.IProgressMonitor, name).__doc__.split("->")[0]),
            list(vars(monitor)[name].__code__.co_varnames[: vars(monitor)[name].__code__.co_argcount]),
        ]
        for name in vars(monitor)
        if not name.startswith("_")
    }
    second = Stage(trt, "mmdit", lambda: b"a plan", SHAPES)
    build()
    found["second cache"] = [
        call.args[0].decode() for call in second.config.create_timing_cache.call_args_list
    ]
    other_version = Stage(trt, "mmdit", lambda: b"a plan", SHAPES)
    other_version.config.set_timing_cache.side_effect = lambda cache, ignore_mismatch: False
    found["refused cache"] = isinstance(build(), dict)
    damaged = Stage(trt, "mmdit", out_of_memory, SHAPES)
    empty = damaged.cache
    damaged.config.create_timing_cache.side_effect = lambda kept: None if refused(kept) else empty
    found["damaged cache"] = build()
    lost = Stage(trt, "mmdit", lambda: b"a plan", SHAPES)
    lost.config.num_optimization_profiles = 1
    found["profile refused"] = build()
    everything = Stage(trt, "mmdit", lambda: b"a plan", SHAPES)
    build(options=Options(strip=True, weight_streaming=True, version_compatible=True))
    found["all flags"] = sorted(int(call.args[0]) for call in everything.config.set_flag.call_args_list)
    wanted = ("TF32", "STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING", "VERSION_COMPATIBLE")
    found["wanted flags"] = sorted(int(getattr(trt.BuilderFlag, name)) for name in wanted)
    found["host code"] = everything.runtime.engine_host_code_allowed

    plain = Stage(trt, "clip_l", lambda: b"a plan")
    before = dict(vars(plain.config))
    build("clip_l", replace(OPTIONS, workspace_gib=None, optimization_level=None, tf32=False))
    found["plain"] = {
        "level set": "builder_optimization_level" in vars(plain.config).keys() - before.keys(),
        "pools": len(plain.config.set_memory_pool_limit.call_args_list),
        "profiles": [
            {call.args[0]: call.args[1:] for call in profile.set_shape.call_args_list}
            for profile in plain.profiles
        ],
        "flags cleared": [call.args[0].name for call in plain.config.clear_flag.call_args_list],
    }

    Stage(trt, "mmdit", out_of_memory, SHAPES)
    found["out of memory"] = build()

    refusing = Stage(trt, "mmdit", lambda: b"a plan", SHAPES)
    refusing.parser.num_errors = 1
    refusing.parser.parse_from_file.side_effect = lambda model: False
    refusing.parser.get_error.side_effect = lambda index: "node 5: unsupported operator Magic"
    found["not parsed"] = build()

    other = Stage(trt, "mmdit", lambda: b"a plan", SHAPES)
    other.engine.get_tensor_dtype.side_effect = lambda name: trt.DataType.BF16
    found["other tensors"] = build()

    unloadable = Stage(trt, "mmdit", lambda: b"a plan", SHAPES)
    unloadable.runtime.deserialize_cuda_engine.side_effect = lambda buffer: None
    found["not loaded"] = build()

    def interrupted() -> None:
        monitor = stage.config.progress_monitor
        monitor.phase_start("Building Engine", None, 4)
        monitor.phase_start("Computing costs", "Building Engine", 10)
        steps = [monitor.step_complete("Computing costs", step) for step in range(3)]
        monitor.phase_finish("Computing costs")
        signal.raise_signal(signal.SIGINT)
        found["goes on"] = [*steps, monitor.step_complete("Building Engine", 0)]

    stage = Stage(trt, "mmdit", interrupted, SHAPES)
    found["interrupted"] = build()
    found["handler restored"] = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print(json.dumps(found))


@pytest.fixture(scope="module", params=VERSIONS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told_by(request.param, "test_engines_plan", tmp_path_factory.mktemp("tensorrt"))


def test_the_network_is_strongly_typed_and_parsed_from_the_file_so_that_weights_outside_are_found(
    told: dict[str, Any],
) -> None:
    assert told["network flags"] == told["strongly typed"]
    assert told["parsed"] == [[told["onnx"]]]


def test_each_size_range_becomes_one_profile_with_its_own_row_limit(told: dict[str, Any]) -> None:
    assert told["profiles added"] == [0, 1]
    small, large = told["profiles"]
    assert small["latent"] == [[1, 4, 8, 8], [2, 4, 16, 16], [12, 4, 32, 32]]
    assert large["latent"] == [[1, 4, 32, 32], [2, 4, 32, 32], [4, 4, 32, 32]]
    assert small["timestep"] == [[1, 1], [2, 1], [12, 1]]
    assert small["context"] == [[1, 84, 12], [2, 84, 12], [12, 84, 12]]
    assert set(small) == {"latent", "timestep", "context", "pooled"}


def test_a_component_whose_dims_do_not_vary_gets_one_profile(told: dict[str, Any]) -> None:
    assert told["plain"]["profiles"] == [{"input_ids": [[1, 77], [1, 77], [1, 77]]}]


def test_the_builder_options_arrive(told: dict[str, Any]) -> None:
    assert told["pools"] == [["WORKSPACE", 3 * 2**29]]
    assert told["level"] == 4
    assert told["verbosity"] == "DETAILED"
    assert told["flags set"] == ["TF32"] and told["flags cleared"] == []
    assert told["plain"]["flags cleared"] == ["TF32"]


def test_options_that_are_not_given_are_left_to_tensorrt(told: dict[str, Any]) -> None:
    assert not told["plain"]["level set"]
    assert told["plain"]["pools"] == 0


def test_timings_are_kept_for_each_gpu_model_and_tensorrt_version(told: dict[str, Any]) -> None:
    assert told["caches"] == [f"nvidia-h100-80gb-hbm3-{told['version']}.cache"]
    assert told["first cache"] == ["", ""]  # Polygraphy's own, and ours while there is none
    assert told["second cache"][1] == "timings"


def test_a_timing_cache_of_another_version_is_replaced_with_a_warning(told: dict[str, Any]) -> None:
    assert told["refused cache"]
    assert "warning: TensorRT refused the timing cache" in told["stderr"]


def test_a_damaged_timing_cache_is_no_cause_of_what_fails_later(told: dict[str, Any]) -> None:
    assert "out of memory" in told["damaged cache"] and "Magic tag" not in told["damaged cache"]


def test_a_profile_that_tensorrt_refuses_ends_the_build_before_it_begins(told: dict[str, Any]) -> None:
    assert "mmdit: TensorRT refused 1 of its 2 optimization profiles" in told["profile refused"]


def test_each_option_sets_its_flag_and_a_stripped_plan_takes_the_same_weights_alone(
    told: dict[str, Any],
) -> None:
    assert told["all flags"] == told["wanted flags"]
    assert told["host code"] is True  # a version-compatible plan brings its runtime


def test_the_plan_is_written_and_what_was_built_where_is_found_out(told: dict[str, Any]) -> None:
    assert told["plan"] == "a plan"
    findings = told["findings"]
    assert findings.pop("seconds_to_build") >= 0
    assert findings.pop("peak_memory_bytes") > 2**20
    assert findings.pop("tensors")["latent"] == [-1, 4, -1, -1]
    assert findings == {
        "gpu": H100.name,
        "compute_capability": "9.0",
        "driver": "580.95",
        "tensorrt": told["version"],
        "engine_bytes": 6,
        "device_memory_bytes": 123,
        "device_memory_bytes_of_profiles": [60, 61],
        "streamable_weights_bytes": 5,
        "layers": 7,
    }


def test_the_progress_monitor_overrides_real_methods_with_their_real_arguments(
    told: dict[str, Any],
) -> None:
    assert told["monitored"]
    assert set(told["monitor"]) == {"phase_start", "step_complete", "phase_finish"}
    for name, (real, ours) in told["monitor"].items():
        assert real == ours, name


def test_an_interrupt_lets_tensorrt_stop_at_its_next_step(told: dict[str, Any]) -> None:
    assert told["goes on"] == [True, True, True, False]
    assert told["interrupted"] == "KeyboardInterrupt"
    assert told["handler restored"]


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("out of memory", r"Cuda Runtime \(out of memory\).*--workspace-gib.*--shapes"),
        ("not parsed", "node 5: unsupported operator Magic.*does not know a node"),
        ("other tensors", r"tensor 'latent' is BF16 \[-1, 4, -1, -1\], expected HALF \[-1, 4, -1, -1\]"),
        ("not loaded", "Could not deserialize engine"),
        ("nothing behind the bindings", "factory function returned nullptr.*nvidia-smi"),
    ],
)
def test_a_failure_names_the_component_and_the_cause_in_one_line(
    told: dict[str, Any], failure: str, words: str
) -> None:
    assert re.match(f"EngineError: mmdit: .*{words}", told[failure]), told[failure]
    assert "\n" not in told[failure]


def test_warnings_of_tensorrt_reach_the_user(told: dict[str, Any]) -> None:
    assert "mmdit: weights were rounded" in told["stderr"]


def test_without_tensorrt_a_plan_cannot_be_built_and_the_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("polygraphy")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    save_source(tmp_path, "clip_l")
    folder = Layout("tiny", tmp_path).onnx("clip_l")
    with pytest.raises(EngineError, match="^clip_l: TensorRT built no engine: .*tensorrt"):
        plan_from_onnx(
            Source("clip_l", Precision.FP16, folder, read_manifest(folder)),
            tmp_path / "model.plan",
            signature=SIGNATURES["clip_l"],
            shapes=shape_set(FAMILY),
            options=Options(),
            timing_caches=tmp_path,
            gpu=H100,
        )
