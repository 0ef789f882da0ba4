"""A TensorRT engine (a "plan") from a component's ONNX file, through Polygraphy.

The network is strongly typed: every precision is the ONNX file's own. TensorRT 11 knows nothing
else; TensorRT 10 (10.13 or later) is told so.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.source import Source
from mmdit.contract import Dtype, Signature, profiles
from mmdit.errors import EngineError
from mmdit.progress import Progress
from mmdit.shapes import ShapeSet
from mmdit.target import Gpu

_DTYPES = {Dtype.FP16: "HALF", Dtype.FP32: "FLOAT", Dtype.INT64: "INT64"}
_MEMORY_WORDS = ("memory", "alloc", "workspace")


@dataclass(frozen=True)
class Options:
    """How TensorRT builds; None leaves it to TensorRT. `workspace_gib` bounds its scratch memory.

    TF32 is on for what the export left in FP32: those islands need FP32's range, and a product in
    TF32 keeps it, with the mantissa of FP16. Layer names stay in the engine, so that its fusions
    can be read.
    """

    workspace_gib: float | None = None
    optimization_level: int | None = None
    tf32: bool = True
    profiling_verbosity: str = "DETAILED"

    @property
    def settings(self) -> dict[str, Any]:
        """What the manifest keeps of them."""
        return asdict(self) | {"strongly_typed": True}


def plan_from_onnx(
    source: Source,
    plan: Path,
    *,
    signature: Signature,
    shapes: ShapeSet,
    options: Options,
    timing_caches: Path,
    gpu: Gpu,
) -> dict[str, Any]:
    """Build a component's engine on this machine's GPU and write it to `plan`.

    One optimization profile for each size range of `shapes`. Tactic timings are kept in
    `timing_caches` for each GPU model and TensorRT version. The engine is loaded once, to see that
    it can be and that its tensors are the contract's. Returns findings. Raises EngineError, with
    TensorRT's own words.
    """
    # CUDA numbers GPUs by speed unless told otherwise, NVML (which found `gpu`) by bus.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    start = time.monotonic()
    with explained(source.component, "built no engine"):
        import tensorrt as trt

        serialized = _build(trt, source, signature, shapes, options, timing_caches, gpu)
        plan.write_bytes(serialized)
        seconds = time.monotonic() - start
        engine = _loaded(trt, serialized)
    _check_tensors(source.component, engine, signature)
    return {
        "gpu": gpu.name,
        "compute_capability": "{}.{}".format(*gpu.compute_capability),
        "driver": gpu.driver,
        "tensorrt": trt.__version__,
        "engine_bytes": plan.stat().st_size,
        "seconds_to_build": round(seconds, 1),
        "device_memory_bytes": int(engine.device_memory_size_v2),
        "layers": int(engine.num_layers),
        "tensors": {
            name: list(engine.get_tensor_shape(name))
            for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
        },
    }


def _build(
    trt: Any,
    source: Source,
    signature: Signature,
    shapes: ShapeSet,
    options: Options,
    timing_caches: Path,
    gpu: Gpu,
) -> Any:
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.backend.trt import Profile as TensorRtProfile

    tensorrt_profiles = []
    for table in profiles(signature, shapes):
        profile = TensorRtProfile()
        for name, (low, middle, high) in table.items():
            profile.add(name, min=low, opt=middle, max=high)
        tensorrt_profiles.append(profile)
    limits = None
    if options.workspace_gib is not None:
        limits = {trt.MemoryPoolType.WORKSPACE: int(options.workspace_gib * 2**30)}
    timing_caches.mkdir(parents=True, exist_ok=True)
    cache = timing_caches / f"{gpu.name.replace(' ', '-').lower()}-{trt.__version__}.cache"
    with _interrupted_gently() as interrupted, Progress(source.component, 100, "%") as progress:
        serialized = EngineBytesFromNetwork(
            NetworkFromOnnxPath(str(source.onnx), strongly_typed=True),
            config=CreateConfig(
                profiles=tensorrt_profiles,
                memory_pool_limits=limits,
                builder_optimization_level=options.optimization_level,
                tf32=options.tf32,
                profiling_verbosity=getattr(trt.ProfilingVerbosity, options.profiling_verbosity),
                progress_monitor=_monitor(trt, progress, interrupted),
                load_timing_cache=str(cache) if cache.exists() else None,
            ),
            save_timing_cache=str(cache),
        )()
    return serialized


def _loaded(trt: Any, serialized: Any) -> Any:
    from polygraphy.backend.trt import get_trt_logger

    engine = trt.Runtime(get_trt_logger()).deserialize_cuda_engine(serialized)
    if engine is None:
        raise RuntimeError("the engine was built, but cannot be loaded")
    return engine


def _check_tensors(component: str, engine: Any, signature: Signature) -> None:
    tensors = {tensor.name: tensor for tensor in (*signature.inputs, *signature.outputs)}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if set(names) != set(tensors):
        raise EngineError(f"{component}: the engine's tensors are {names}, expected {list(tensors)}")
    for name, tensor in tensors.items():
        dtype, dims = engine.get_tensor_dtype(name).name, list(engine.get_tensor_shape(name))
        expected = [-1, *(-1 if isinstance(dim, str) else dim for dim in tensor.dims)]
        # -1 is a dim that is known when the engine runs.
        same = len(dims) == len(expected) and all(
            -1 in (dim, wanted) or dim == wanted for dim, wanted in zip(dims, expected, strict=True)
        )
        if dtype != _DTYPES[tensor.dtype] or not same:
            raise EngineError(
                f"{component}: the engine's tensor {name!r} is {dtype} {dims}, expected "
                f"{_DTYPES[tensor.dtype]} {expected}"
            )


def _monitor(trt: Any, progress: Progress, interrupted: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Turns TensorRT's tree of phases into one bar; stops the build after Ctrl-C.

        TensorRT calls it from several threads, and an exception here would end the process.
        """

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, done

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = (parent_phase, max(num_steps, 1), 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name in self._phases:
                    parent, steps, _ = self._phases[phase_name]
                    self._phases[phase_name] = (parent, steps, step + 1)
                roots = [name for name, phase in self._phases.items() if not phase[0]]
                progress.update(max([progress.done, *(int(99 * self._part(r)) for r in roots)]))
            return not interrupted.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

        def _part(self, name: str) -> float:
            _, steps, done = self._phases[name]
            inner = [self._part(child) for child in self._phases if self._phases[child][0] == name]
            return min(1.0, (done + sum(inner)) / steps)

    return Monitor()


@contextlib.contextmanager
def _interrupted_gently() -> Iterator[threading.Event]:
    """Ctrl-C sets an event while TensorRT works: an exception in its callbacks ends the process."""
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted.is_set():
            raise KeyboardInterrupt


@contextlib.contextmanager
def explained(component: str, what: str) -> Iterator[None]:
    """Warnings of TensorRT go to stderr; its errors become an EngineError that says `what` failed."""
    errors: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage().strip()
            if record.levelno >= logging.ERROR:
                errors.append(text)
            else:
                print(f"{component}: {text}", file=sys.stderr)

    try:
        from polygraphy.logger import G_LOGGER

        G_LOGGER.use_python_logging_system = True
        G_LOGGER.module_severity = G_LOGGER.WARNING
        G_LOGGER.letter = G_LOGGER.colors = False
        logging.getLogger("Polygraphy").handlers = [Handler()]
        logging.getLogger("Polygraphy").propagate = False
        yield
    except Exception as error:  # TensorRT, Polygraphy and the dynamic loader raise their own
        causes = list(dict.fromkeys(errors)) or [f"{type(error).__name__}: {error}"]
        cause = "; ".join(" ".join(text.split()) for text in causes[:4])
        way_out = ""
        if what == "built no engine" and any(word in cause.lower() for word in _MEMORY_WORDS):
            way_out = (
                ". Building takes about twice the memory of running: free the GPU, bound the build "
                "with --workspace-gib, or choose a smaller shape set with --shapes"
            )
        raise EngineError(f"{component}: TensorRT {what}: {cause}{way_out}") from error
