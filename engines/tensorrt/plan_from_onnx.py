"""A TensorRT engine (a "plan") from a component's ONNX file, through Polygraphy.

The network is strongly typed: every precision is the ONNX file's own. TensorRT 11 knows nothing
else; TensorRT 10 (10.13 or later) is told so.
"""

import os
import resource
import time
from pathlib import Path
from typing import Any

from engines.engine import Build
from engines.runtimes import RUNTIMES
from engines.source import Source
from engines.tensorrt.child import in_child
from engines.tensorrt.failures import explained
from engines.tensorrt.monitor import interrupted_gently, monitor
from engines.tensorrt.options import Options
from engines.tensorrt.timing_cache import TimingCache
from mmdit.contract import Dtype, Profile, Signature, components, profiles
from mmdit.errors import EngineError
from mmdit.progress import Progress
from mmdit.shapes import ShapeSet
from mmdit.target import Gpu

PLAN = RUNTIMES["tensorrt"].file
_DTYPES = {Dtype.FP16: "HALF", Dtype.FP32: "FLOAT", Dtype.INT64: "INT64"}


def plan_in_child(source: Source, folder: Path, job: Build) -> dict[str, Any]:
    """Build a component's plan into `folder` in a child process; returns findings. Raises EngineError."""
    assert job.gpu is not None  # resolve() gives no TensorRT target without one
    findings = in_child(
        source.component,
        plan_from_onnx,
        source,
        folder / PLAN,
        signature=components(job.family, job.shapes)[source.component],
        shapes=job.shapes,
        options=job.options,
        timing_caches=job.layout.root.parent / "timing-caches",
        gpu=job.gpu,
    )
    _check_size(source.component, folder / PLAN, findings)
    return findings


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
    `timing_caches` for each GPU model and TensorRT version. The plan is read back and loaded once, to see
    that it can be and that its tensors are the contract's. Returns findings: bytes, seconds. Raises
    EngineError, with TensorRT's own words.

    It takes the whole machine's memory for itself: call it through `engines.tensorrt.child`.
    """
    # CUDA numbers GPUs by speed unless told otherwise, NVML (which found `gpu`) by bus.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    start = time.monotonic()
    with explained(source.component, "built no engine") as errors:
        import tensorrt as trt

        cache = TimingCache(timing_caches, gpu.name, trt.__version__)
        tables = profiles(signature, shapes)
        write_whole(plan, _build(trt, source.component, source.onnx, tables, options, cache, errors))
        seconds = time.monotonic() - start
        found = read_back(source.component, plan, signature)
    return {
        **found_on(gpu, trt.__version__),
        **found,
        "seconds_to_build": round(seconds, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # of this process
    }


def _build(
    trt: Any,
    component: str,
    onnx: Path,
    tables: list[Profile],
    options: Options,
    cache: TimingCache,
    errors: list[str],
) -> Any:
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.backend.trt import Profile as TensorRtProfile

    tensorrt_profiles = []
    for table in tables:
        profile = TensorRtProfile()
        for name, (low, middle, high) in table.items():
            profile.add(name, min=low, opt=middle, max=high)
        tensorrt_profiles.append(profile)
    limits = None
    if options.workspace_gib is not None:
        limits = {trt.MemoryPoolType.WORKSPACE: int(options.workspace_gib * 2**30)}
    with interrupted_gently() as interrupted, Progress(component, 100, "%") as progress:
        builder, network, parser = NetworkFromOnnxPath(str(onnx), strongly_typed=True)()
        config = CreateConfig(
            profiles=tensorrt_profiles,
            memory_pool_limits=limits,
            builder_optimization_level=options.optimization_level,
            tf32=options.tf32,
            strip_plan=options.strip,
            weight_streaming=options.weight_streaming,
            version_compatible=options.version_compatible,
            profiling_verbosity=trt.ProfilingVerbosity.DETAILED,  # layers keep their names, to be inspected
            progress_monitor=monitor(trt, progress, interrupted),
        )(builder, network)
        if config.num_optimization_profiles != len(tables):  # TensorRT says so with an index of -1 alone
            raise EngineError(
                f"{component}: TensorRT refused {len(tables) - config.num_optimization_profiles} of its "
                f"{len(tables)} optimization profiles: {'; '.join(errors) or tables}"
            )
        if options.strip:
            config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)  # the same weights come back: nothing is lost
        if not cache.load(config):
            errors.clear()  # TensorRT's, about the cache that it refused
        serialized = EngineBytesFromNetwork((builder, network, parser), config)()
        cache.save(config)
    return serialized


def _check_size(component: str, plan: Path, findings: dict[str, Any]) -> None:
    size = plan.stat().st_size if plan.exists() else 0
    if not size or size != findings["engine_bytes"]:
        raise EngineError(
            f"{component}: {plan.name} holds {size} bytes, and {findings['engine_bytes']} were built: it was "
            "cut off or changed meanwhile; build it again"
        )


def write_whole(plan: Path, serialized: Any) -> None:
    """Write a plan through to the disk: some file systems tell only then that they are full."""
    with plan.open("wb") as stream:
        stream.write(serialized)
        stream.flush()
        os.fsync(stream.fileno())


def read_back(component: str, plan: Path, signature: Signature) -> dict[str, Any]:
    """Load a plan from its file; give what it says of itself, bytes.

    Raises EngineError when its tensors are not those of `signature`, whatever TensorRT raises when it cannot
    be loaded.
    """
    from polygraphy.backend.trt import EngineFromBytes

    content = plan.read_bytes()
    engine = EngineFromBytes(content)()
    _check_tensors(component, engine, signature)
    return {
        "engine_bytes": len(content),
        "device_memory_bytes": int(engine.device_memory_size_v2),
        "device_memory_bytes_of_profiles": [
            int(engine.get_device_memory_size_for_profile_v2(index))
            for index in range(engine.num_optimization_profiles)
        ],
        "streamable_weights_bytes": int(engine.streamable_weights_size),
        "layers": int(engine.num_layers),
        "tensors": {
            name: list(engine.get_tensor_shape(name))
            for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
        },
    }


def found_on(gpu: Gpu, tensorrt: str) -> dict[str, Any]:
    """What a plan's manifest says of the machine that made it."""
    return {
        "gpu": gpu.name,
        "compute_capability": "{}.{}".format(*gpu.compute_capability),
        "driver": gpu.driver,
        "tensorrt": tensorrt,
    }


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
