"""TensorRT without TensorRT: its real Python bindings over empty libraries, and stand-ins of its classes.

A stand-in knows only the names and keywords of the real class.
"""

import ctypes
import functools
import importlib
import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import NonCallableMagicMock

from tiny_model import FAMILY, ROOT, SIGNATURES

from mmdit.contract import profiles
from mmdit.shapes import ShapeSet, shape_set

BINDINGS = next((n for n in ("tensorrt_bindings", "tensorrt") if importlib.util.find_spec(n)), "")
VERSIONS = ("11.4", "10.13")  # the newest that is known, and the oldest that is supported
_OLDEST = "tensorrt-cu12-bindings==10.13.3.9"
SHAPES = shape_set(FAMILY)
REAL: dict[str, Any] = {}  # the classes that a Stage replaces

_REPLACED = ("Builder", "OnnxParser", "Runtime", "Refitter", "OnnxParserRefitter")

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


@functools.cache
def bindings(version: str) -> tuple[str, ...]:
    """What stands first on `sys.path` of a process that loads the bindings of one of VERSIONS.

    The newest are installed with the tests' other packages. The oldest cannot lie beside them, and are
    fetched into `build/` once.
    """
    if version == VERSIONS[0]:
        assert BINDINGS, "TensorRT's bindings are not installed: run `make setup`"
        return ()
    folder = ROOT / "build" / _OLDEST.replace("==", "-")
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(partial),
            _OLDEST,
        ]
        done = subprocess.run(pip, capture_output=True, text=True)
        assert done.returncode == 0, (
            f"{_OLDEST} cannot be installed, and nothing shows that it would work: {done.stderr}"
        )
        partial.rename(folder)
    return (str(folder),)


def libnvinfer(version: int) -> bytes:
    """An empty libnvinfer whose getInferLibVersion answers `version`."""
    returns_0, returns = b"\x31\xc0\xc3", b"\xb8" + version.to_bytes(4, "little") + b"\xc3"  # mov eax, …; ret
    library = shared_library("libnvinfer.so.11", ("getInferLibVersion",))
    at = library.index(returns_0, 64 + 4 * 56)
    # The code is padded to 8 bytes, which hold the longer one.
    assert not any(library[at + len(returns_0) : at + len(returns)])
    return library[:at] + returns + library[at + len(returns) :]


def told_by(version: str, module: str, folder: Path) -> dict[str, Any]:
    """What a test's `run_scenarios(folder)` prints as JSON in a process with the bindings of `version`."""
    tier = module.split("_")[1]  # test_engines_plan lies in tests/engines
    paths = [*bindings(version), str(ROOT), *(str(ROOT / "tests" / each) for each in ("support", tier))]
    code = (
        f"import sys; from pathlib import Path; sys.path[:0] = {paths!r}\n"
        f"from mmdit import artifact; import {module}\n"
        f"artifact._HASHES = Path({str(folder)!r}, '.sha256.json')\n"
        f"{module}.run_scenarios(Path({str(folder)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}
    assert told["version"].startswith(version)
    return told


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
    REAL.update({name: getattr(trt, name) for name in _REPLACED})
    return trt


def stand_in(cls: Any, **results: Any) -> Any:
    """A mock with the attributes and methods of a TensorRT class; a wrong keyword raises TypeError."""
    mock = NonCallableMagicMock(spec_set=cls)
    for name in dir(cls):
        method = getattr(cls, name)
        if not name.startswith("_") and callable(method) and not isinstance(method, type):
            getattr(mock, name).side_effect = checked(name, method.__doc__, results.pop(name, None))
    for name, value in results.items():
        setattr(mock, name, value)
    return mock


def checked(name: str, doc: str, result: Any) -> Callable[..., Any]:
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
        if callable(result):
            return result(*arguments, **keywords)
        return result

    return called


class Stage:
    """TensorRT as far as a build sees it: stand-ins of its classes, with a network of one component."""

    def __init__(
        self, trt: Any, component: str, during: Callable[[], bytes | None], shapes: ShapeSet = SHAPES
    ) -> None:
        signature = SIGNATURES[component]
        tensors = [stand_in(trt.ITensor, name=t.name, is_shape_tensor=False) for t in signature.inputs]
        self.network = stand_in(
            trt.INetworkDefinition, num_inputs=len(tensors), get_input=lambda index: tensors[index]
        )
        self.network.__len__.return_value = 0
        self.network.__getitem__.side_effect = IndexError
        self.profiles: list[Any] = []
        self.cache = stand_in(trt.ITimingCache, serialize=b"timings", combine=True)
        self.config = stand_in(
            trt.IBuilderConfig,
            DLA_core=-1,
            num_optimization_profiles=len(profiles(signature, shapes)),
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
            REAL["Builder"],
            create_network=self.network,
            create_builder_config=self.config,
            create_optimization_profile=self._profile(trt),
            build_serialized_network=lambda *_: during(),
        )
        self.parser = stand_in(REAL["OnnxParser"], num_errors=0, parse_from_file=True)
        names = [tensor.name for tensor in (*signature.inputs, *signature.outputs)]
        dtypes = {"FP16": trt.DataType.HALF, "FP32": trt.DataType.FLOAT, "INT64": trt.DataType.INT64}
        declared = {tensor.name: tensor for tensor in (*signature.inputs, *signature.outputs)}
        self.engine = stand_in(
            trt.ICudaEngine,
            num_io_tensors=len(names),
            num_layers=7,
            device_memory_size_v2=123,
            num_optimization_profiles=2,
            get_device_memory_size_for_profile_v2=lambda profile_index: 60 + profile_index,
            streamable_weights_size=5,
            create_serialization_config=stand_in(trt.ISerializationConfig, clear_flag=True),
            serialize_with_config=b"a full plan",
            get_tensor_name=lambda index: names[index],
            get_tensor_dtype=lambda name: dtypes[declared[name].dtype.value],
            get_tensor_shape=lambda name: (
                -1,
                *(-1 if isinstance(dim, str) else dim for dim in declared[name].dims),
            ),
        )
        self.runtime = stand_in(REAL["Runtime"], deserialize_cuda_engine=self.engine)
        self.refitter = stand_in(REAL["Refitter"], refit_cuda_engine=True, get_missing_weights=["bias"])
        self.refit_parser = stand_in(REAL["OnnxParserRefitter"], refit_from_file=True, num_errors=1)
        self.refit_parser.get_error.side_effect = lambda index: "In node 3: weights of another size"
        for cls, mock in (
            ("Builder", self.builder),
            ("OnnxParser", self.parser),
            ("Runtime", self.runtime),
            ("Refitter", self.refitter),
            ("OnnxParserRefitter", self.refit_parser),
        ):
            constructor = checked("__init__", REAL[cls].__init__.__doc__, mock)
            setattr(trt, cls, constructor)
        trt.init_libnvinfer_plugins = lambda logger, namespace: True

    def _profile(self, trt: Any) -> Callable[[], Any]:
        def made() -> Any:
            self.profiles.append(stand_in(trt.IOptimizationProfile))
            return self.profiles[-1]

        return made
