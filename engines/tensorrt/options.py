"""How TensorRT builds an engine: the choices that an operator has."""

from dataclasses import asdict, dataclass
from typing import Any

from mmdit.errors import EngineError


@dataclass(frozen=True)
class Options:
    """Choices for TensorRT's builder; None leaves one to TensorRT.

    - `workspace_gib` bounds its scratch memory; `optimization_level` is its effort, 0 to 5.
    - `tf32` is for what the export left in FP32: those islands need FP32's range, and a product in TF32 keeps
      it, with the mantissa of FP16.
    - `strip` leaves the weights out of the plan, a few per cent of its size, for object storage;
      `engines.tensorrt.refit` puts them back on the GPU's machine. No server can run a stripped plan.
    - `weight_streaming` keeps weights in the machine's memory and streams them, for a card with too little of
      its own. Triton's TensorRT backend sets no budget for it and loads all of them: it helps
      `engines.runner` alone.
    - `version_compatible` makes a plan that later TensorRT versions load too, somewhat slower; Triton wants
      `--backend-config=tensorrt,version-compatible=true`, for the plan brings code with it.

    TensorRT lets the last three be combined (trtexec 11.1 does), and 10 wants a strongly typed network for
    weight streaming, which all of ours are.
    Raises EngineError for a value that TensorRT would refuse.
    """

    workspace_gib: float | None = None
    optimization_level: int | None = None
    tf32: bool = True
    strip: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False

    def __post_init__(self) -> None:
        if self.workspace_gib is not None and not self.workspace_gib > 0:
            raise EngineError(f"a workspace of {self.workspace_gib} GiB holds nothing: expected more than 0")
        if self.optimization_level is not None and self.optimization_level not in range(6):
            raise EngineError(f"optimization level {self.optimization_level} is unknown: expected 0 to 5")

    @property
    def words(self) -> str:
        """The same on the command line, each with a space before it."""
        given = "" if self.workspace_gib is None else f" --workspace-gib {self.workspace_gib:g}"
        given += "" if self.optimization_level is None else f" --optimization-level {self.optimization_level}"
        flags = {
            "--no-tf32": not self.tf32,
            "--strip": self.strip,
            "--weight-streaming": self.weight_streaming,
            "--version-compatible": self.version_compatible,
        }
        return given + "".join(f" {name}" for name, is_set in flags.items() if is_set)

    @property
    def settings(self) -> dict[str, Any]:
        """What the manifest keeps of them."""
        return asdict(self) | {"strongly_typed": True}
