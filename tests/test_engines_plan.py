"""TensorRT's builder cannot run without a GPU, but its Python bindings can be loaded without TensorRT.

They need three shared libraries, which these tests write: they define the functions that the bindings
import, each of which returns null. A child process then builds with stand-ins that know only the
names and keywords of the real classes, through the real Polygraphy; the tests read what arrived.
"""

import ctypes
import importlib
import importlib.util
import json
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from test_engines_onnxruntime import FAMILY, ROOT, SIGNATURES, save_source

from engines.plan_from_onnx import Options, plan_from_onnx
from engines.source import Source
from mmdit.artifact import Layout, read_manifest
from mmdit.contract import Precision
from mmdit.errors import EngineError
from mmdit.shapes import ShapeSet, SizeRange, shape_set
from mmdit.target import Gpu

BINDINGS = next((n for n in ("tensorrt_bindings", "tensorrt") if importlib.util.find_spec(n)), "")
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), "580.95")
SMALL = SizeRange(min=(64, 64), opt=(128, 128), max=(256, 256), max_rows=12)
LARGE = SizeRange(min=(256, 256), opt=(256, 256), max=(256, 256), max_rows=4)
SHAPES = ShapeSet(name="two", multiple=16, ranges=(SMALL, LARGE))
OPTIONS = Options(workspace_gib=1.5, optimization_level=4)

# What the bindings of TensorRT 10.13 and 11.4 import from its libraries.
_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def shared_library(name: str, functions: tuple[str, ...]) -> bytes:
    """An ELF file for x86-64 with the SONAME `name`, whose functions all return 0."""
    page, code = 0x1000, b"\x31\xc0\xc3"  # xor eax, eax; ret
    strings, offsets = b"\0", []
    for string in (name, *functions):
        offsets.append(len(strings))
        strings += string.encode() + b"\0"
    code_at = 64 + 4 * 56
    symbols_at = (code_at + len(code) + 7) // 8 * 8
    symbols = bytes(24) + b"".join(
        struct.pack("<IBBHQQ", offset, 0x12, 0, 1, code_at, len(code)) for offset in offsets[1:]
    )
    count = len(functions) + 1
    chain = [0, *range(count - 1)]  # one bucket, which holds them all, last to first
    hashes = struct.pack(f"<{3 + count}I", 1, count, count - 1, *chain)
    hashes_at = symbols_at + len(symbols)
    strings_at = hashes_at + len(hashes)
    tags = {4: hashes_at, 5: strings_at, 6: symbols_at, 10: len(strings), 11: 24, 14: offsets[0], 0: 0}
    dynamic = b"".join(struct.pack("<QQ", tag, value) for tag, value in tags.items())
    header = b"\x7fELF\2\1\1".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 0, 0, 0)

    def segment(kind: int, flags: int, at: int, size: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, page if kind == 1 else 8)

    header += segment(1, 5, 0, strings_at + len(strings))  # PT_LOAD, code
    header += segment(1, 6, page, len(dynamic))  # PT_LOAD, data
    header += segment(2, 6, page, len(dynamic))  # PT_DYNAMIC
    header += segment(0x6474E551, 6, 0, 0)  # PT_GNU_STACK, not executable
    body = (header + code).ljust(symbols_at, b"\0") + symbols + hashes + strings
    return body.ljust(page, b"\0") + dynamic


def real_bindings(folder: Path) -> Any:
    """TensorRT's real module, over libraries that hold nothing."""
    spec = importlib.util.find_spec(BINDINGS)
    assert spec is not None and spec.submodule_search_locations is not None
    binary = (Path(spec.submodule_search_locations[0]) / "tensorrt.so").read_bytes()
    needed = {found.decode() for found in re.findall(rb"libnv\w+\.so\.\d+", binary)}
    assert len(needed) == 3, needed
    for name in sorted(needed):
        functions = _FUNCTIONS if name.startswith("libnvinfer.so") else ()
        (folder / name).write_bytes(shared_library(name, functions))
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    trt = importlib.import_module(BINDINGS)
    sys.modules["tensorrt"] = trt
    return trt


def stand_in(cls: Any, **results: Any) -> Any:
    """A mock with the attributes and methods of a TensorRT class; a wrong keyword raises TypeError."""
    mock = MagicMock(spec_set=cls)
    for name in dir(cls):
        method = getattr(cls, name)
        if not name.startswith("_") and callable(method) and not isinstance(method, type):
            getattr(mock, name).side_effect = _checked(name, method.__doc__, results.pop(name, None))
    for name, value in results.items():
        setattr(mock, name, value)
    return mock


def _checked(name: str, doc: str, result: Any) -> Callable[..., Any]:
    signatures = [
        re.findall(r"(\w+): ", found)[1:] for found in re.findall(rf"{name}\((self: .*?)\) ->", doc)
    ]
    assert signatures, f"{name}: {doc}"

    def called(*arguments: Any, **keywords: Any) -> Any:
        if not any(
            len(arguments) + len(keywords) <= len(names) and keywords.keys() <= set(names[len(arguments) :])
            for names in signatures
        ):
            raise TypeError(f"{name}{arguments} {keywords} fits none of {signatures}")
        if callable(result) and not isinstance(result, MagicMock):
            return result(*arguments, **keywords)
        return result

    return called


class Stage:
    """TensorRT as far as a build sees it: stand-ins of its classes, with a network of one component."""

    def __init__(self, trt: Any, component: str, during: Callable[[], bytes | None]) -> None:
        signature = SIGNATURES[component]
        tensors = [stand_in(trt.ITensor, name=t.name, is_shape_tensor=False) for t in signature.inputs]
        self.network = stand_in(
            trt.INetworkDefinition, num_inputs=len(tensors), get_input=lambda index: tensors[index]
        )
        self.network.__len__.return_value = 0
        self.network.__getitem__.side_effect = IndexError
        self.profiles: list[Any] = []
        buffer = stand_in(trt.IHostMemory)
        buffer.__enter__.return_value = b"timings"
        self.cache = stand_in(trt.ITimingCache, serialize=buffer, combine=True)
        self.config = stand_in(
            trt.IBuilderConfig,
            DLA_core=-1,
            num_optimization_profiles=2,
            get_flag=False,
            get_memory_pool_limit=0,
            get_tactic_sources=0,
            create_timing_cache=self.cache,
            get_timing_cache=self.cache,
            set_timing_cache=True,
        )
        if hasattr(trt.IBuilderConfig, "int8_calibrator"):  # TensorRT 10
            self.config.int8_calibrator = None
        self.builder = stand_in(
            _REAL["Builder"],
            create_network=self.network,
            create_builder_config=self.config,
            create_optimization_profile=self._profile(trt),
            build_serialized_network=lambda *_: during(),
        )
        self.parser = stand_in(_REAL["OnnxParser"], num_errors=0, parse_from_file=True)
        names = [tensor.name for tensor in (*signature.inputs, *signature.outputs)]
        dtypes = {"FP16": trt.DataType.HALF, "FP32": trt.DataType.FLOAT, "INT64": trt.DataType.INT64}
        declared = {tensor.name: tensor for tensor in (*signature.inputs, *signature.outputs)}
        self.engine = stand_in(
            trt.ICudaEngine,
            num_io_tensors=len(names),
            num_layers=7,
            device_memory_size_v2=123,
            get_tensor_name=lambda index: names[index],
            get_tensor_dtype=lambda name: dtypes[declared[name].dtype.value],
            get_tensor_shape=lambda name: (
                -1,
                *(-1 if isinstance(dim, str) else dim for dim in declared[name].dims),
            ),
        )
        self.runtime = stand_in(_REAL["Runtime"], deserialize_cuda_engine=self.engine)
        for cls, mock in (
            ("Builder", self.builder),
            ("OnnxParser", self.parser),
            ("Runtime", self.runtime),
        ):
            constructor = _checked("__init__", _REAL[cls].__init__.__doc__, mock)
            setattr(trt, cls, constructor)
        trt.init_libnvinfer_plugins = lambda logger, namespace: True

    def _profile(self, trt: Any) -> Callable[[], Any]:
        def made() -> Any:
            self.profiles.append(stand_in(trt.IOptimizationProfile))
            return self.profiles[-1]

        return made


_REAL: dict[str, Any] = {}


def run_scenarios(folder: Path) -> None:
    """In the child process: build in several ways, print what TensorRT was told as JSON."""
    trt = real_bindings(folder)
    _REAL.update({name: getattr(trt, name) for name in ("Builder", "OnnxParser", "Runtime")})
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

    found["nothing behind the bindings"] = build()

    stage = Stage(trt, "mmdit", lambda: b"a plan")
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
    found["first cache"] = config.create_timing_cache.call_args_list[0].args[0].decode()
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
    second = Stage(trt, "mmdit", lambda: b"a plan")
    build()
    found["second cache"] = second.config.create_timing_cache.call_args_list[0].args[0].decode()

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

    def out_of_memory() -> None:
        from polygraphy.backend.trt import get_trt_logger

        get_trt_logger().log(trt.Logger.WARNING, "weights were rounded")
        get_trt_logger().log(trt.Logger.ERROR, "[defaultAllocator] Cuda Runtime (out of memory)")

    Stage(trt, "mmdit", out_of_memory)
    found["out of memory"] = build()

    refusing = Stage(trt, "mmdit", lambda: b"a plan")
    refusing.parser.num_errors = 1
    refusing.parser.parse_from_file.side_effect = lambda model: False
    refusing.parser.get_error.side_effect = lambda index: "node 5: unsupported operator Magic"
    found["not parsed"] = build()

    other = Stage(trt, "mmdit", lambda: b"a plan")
    other.engine.get_tensor_dtype.side_effect = lambda name: trt.DataType.BF16
    found["other tensors"] = build()

    unloadable = Stage(trt, "mmdit", lambda: b"a plan")
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

    stage = Stage(trt, "mmdit", interrupted)
    found["interrupted"] = build()
    found["handler restored"] = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print(json.dumps(found))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    assert BINDINGS, "TensorRT's bindings are not installed: run `make setup`"
    pytest.importorskip("polygraphy")
    folder = tmp_path_factory.mktemp("tensorrt")
    code = (
        f"import sys; from pathlib import Path; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from mmdit import artifact; import test_engines_plan\n"
        f"artifact._HASHES = Path({str(folder)!r}, '.sha256.json')\n"
        f"test_engines_plan.run_scenarios(Path({str(folder)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


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
    assert (told["first cache"], told["second cache"]) == ("", "timings")


def test_the_plan_is_written_and_what_was_built_where_is_found_out(told: dict[str, Any]) -> None:
    assert told["plan"] == "a plan"
    findings = told["findings"]
    assert findings.pop("seconds_to_build") >= 0
    assert findings.pop("tensors")["latent"] == [-1, 4, -1, -1]
    assert findings == {
        "gpu": H100.name,
        "compute_capability": "9.0",
        "driver": "580.95",
        "tensorrt": told["version"],
        "engine_bytes": 6,
        "device_memory_bytes": 123,
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
        ("not parsed", "node 5: unsupported operator Magic"),
        ("other tensors", r"tensor 'latent' is BF16 \[-1, 4, -1, -1\], expected HALF \[-1, 4, -1, -1\]"),
        ("not loaded", "the engine was built, but cannot be loaded"),
        ("nothing behind the bindings", "factory function returned nullptr"),
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
