"""Why TensorRT failed, in one line with the way out.

TensorRT says little in its exceptions and much in its log: "Could not find any implementation for node" is
what remains of a card that ran out of memory as well as of a kernel that does not exist. The causes are told
apart by all that it logged; the words are those of TensorRT 10 and 11, as their users report them.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from mmdit.errors import EngineError

_MEMORY = (
    r"out ?of ?memory|insufficient memory|could not be allocated|cannot allocate memory|bad_alloc|"
    r"allocat\w+ \d+-byte|memory is insufficient|mem_alloc_failed|memoryerror"
)
_NODE = r"implementation for node (?P<node>\{.*?\}|.*?)(?=\.(?:\)|;|\s|$)|;|$)"
_PARSED = r"In node -?\d+ with name: (?P<node>.*?) and operator: (?P<operator>\w+)"


@dataclass(frozen=True)
class Cause:
    """A kind of failure: what its messages look like, and what to do about it.

    `way_out` may name `{node}` and `{operator}`, which `pattern` finds.
    """

    name: str
    pattern: str
    way_out: str


# The first that fits is the cause: the more particular stand first.
CAUSES = (
    Cause(
        "disk full",
        r"no space left on device|disk quota exceeded|file too large|errno 28|errno 122",
        "The disk is full: free space there, or choose another place with --build",
    ),
    Cause(
        "driver",
        r"cuda driver version is insufficient|cuda initialization failure|no cuda-capable device|"
        r"forward compatibility was attempted|factory function returned nullptr",
        "TensorRT does not reach the GPU: `nvidia-smi` must show it, with a driver as new as TensorRT's "
        "CUDA; a container needs `--gpus`",
    ),
    Cause(
        "installation",
        r"no module named .?(tensorrt|polygraphy)|cannot open shared object file|undefined symbol|"
        r"import of tensorrt halted",
        "TensorRT's library and its Python package must both be there, of one version: `pip install "
        "tensorrt`, or work in NVIDIA's TensorRT or Triton container",
    ),
    Cause(
        "no FP8",
        r"fp8.{0,40}(require|need)s? hardware|hardware with fp8|unsupported sm version for fp8",
        "This GPU has no FP8, which begins with sm89: build with PRECISION=fp16",
    ),
    Cause(
        "unsupported node",
        _PARSED,
        "TensorRT's parser has no {operator} as node {node} uses it: a newer TensorRT may; else export again "
        "without it",
    ),
    Cause(
        "unsupported node",
        r"unsupported_(node|graph)\w*|unsupported operator|plugin not found|"
        r"no importer registered for op",
        "TensorRT's parser does not know a node of the ONNX file: a newer TensorRT may; else export again "
        "without it",
    ),
    Cause(
        "memory",
        _MEMORY,
        "Building takes about twice the memory of running: free the GPU, bound the build with "
        "--workspace-gib, or choose a smaller shape set with --shapes",
    ),
    Cause(
        "version",
        r"version tag does not match|plan file is not compatible with this version|serialization_?version|"
        r"incompatible device|got compute \d|built with (an older|a newer|a different)|"
        r"magic ?tag does not match|engine deserialization failed|model_deserialize_failed",
        "The plan is of another TensorRT or GPU, or damaged: build it again here with `make engines`",
    ),
    Cause(
        "types",
        r"strongly.?typed|must have the same (data ?)?type|mismatched types|type mismatch|"
        r"could not infer output types|no matching rules found for input operand types",
        "The ONNX file mixes types where a strongly typed network may not: export it again, and let the "
        "readiness check name the node",
    ),
    Cause(
        "no kernel",
        _NODE,
        "No kernel of this GPU does node {node} in its precision and shapes: raise --optimization-level, "
        "give more room with --workspace-gib, or try another TensorRT; for an FP8 node also PRECISION=fp16",
    ),
    Cause(
        "profile",
        r"optimization profile|profile is not valid|kmin|kmax dimension",
        "A profile is not what the graph takes: choose another shape set with --shapes, or export the ONNX "
        "file again",
    ),
)
_RUNNING = {
    "memory": "Free the GPU, or build with a smaller shape set (--shapes): each profile reserves memory for "
    "its largest shape",
}


def way_out(errors: str, log: str = "", *, building: bool = True) -> str | None:
    """What to do about TensorRT's `errors`; None when nobody knows.

    `log` is what else it said. A warning there is no cause by itself, but memory that was missing explains
    why no kernel was found.
    """
    for cause in CAUSES:
        found = re.search(cause.pattern, errors, re.IGNORECASE)
        if found is None:
            continue
        if cause.name == "no kernel" and re.search(_MEMORY, log, re.IGNORECASE):
            cause = next(each for each in CAUSES if each.name == "memory")
        words = cause.way_out if building else _RUNNING.get(cause.name, cause.way_out)
        return words.format_map({name: value or "?" for name, value in found.groupdict().items()})
    return None


@contextlib.contextmanager
def explained(component: str, what: str) -> Iterator[list[str]]:
    """Warnings of TensorRT go to stderr; its errors become an EngineError that says `what` failed.

    Yields the list of its errors so far, for who has dealt with some of them.
    """
    errors: list[str] = []
    warnings: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage().strip()
            if record.levelno >= logging.ERROR:
                errors.append(text)
            else:
                warnings.append(text)
                print(f"{component}: {text}", file=sys.stderr)

    try:
        from polygraphy.logger import G_LOGGER

        G_LOGGER.use_python_logging_system = True
        G_LOGGER.module_severity = G_LOGGER.WARNING
        G_LOGGER.letter = G_LOGGER.colors = False
        logging.getLogger("Polygraphy").handlers = [Handler()]
        logging.getLogger("Polygraphy").propagate = False
        yield errors
    except Exception as error:  # TensorRT, Polygraphy and the dynamic loader raise their own
        if isinstance(error, EngineError):
            raise
        own = f"{type(error).__name__}: {error}"
        causes = list(dict.fromkeys(errors)) or [own]
        if isinstance(error, OSError):
            causes = [own]
        told = "; ".join(" ".join(text.split()) for text in causes[:4])
        out = way_out(
            " ".join("; ".join([*causes, own]).split()),
            " ".join(warnings + errors),
            building=what.startswith("built"),
        )
        sentence = f"{told.rstrip('.')}. {out}" if out else told
        raise EngineError(f"{component}: TensorRT {what}: {sentence}") from error
