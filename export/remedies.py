"""What is done to a component so that FP16 holds its activations: folds first, then FP32 islands.

The overflow scan finds them (`export.scan`); they are applied to the loaded module before it is traced.
"""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from mmdit.errors import QuantizationError

if TYPE_CHECKING:  # what is up to date is told without torch
    from torch import nn

# 2^15 is the largest power of two in FP16, and what CLIP's output is multiplied by in the graph.
LARGEST_POWER = 15


class Fold(BaseModel):
    """A residual stream scaled by 2^-power, because a tensor on it reached `magnitude`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: str
    power: int = Field(ge=1, le=LARGEST_POWER)
    magnitude: float
    tensor: str
    reason: str


class Island(BaseModel):
    """A submodule in FP32, by its path in the component's module, because `tensor` reached `magnitude`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    magnitude: float
    tensor: str
    reason: str


class Remedies(BaseModel):
    """A component's remedies; none by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folds: tuple[Fold, ...] = ()
    islands: tuple[Island, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.folds or self.islands)

    def listed(self) -> list[dict[str, object]]:
        """Each remedy with its place, and the magnitude that called for it."""
        folds = [
            {
                "remedy": f"2^-{fold.power} folded into the residual stream",
                "place": fold.stream,
                **fold.model_dump(include={"tensor", "magnitude", "reason"}),
            }
            for fold in self.folds
        ]
        islands = [
            {
                "remedy": "FP32 island",
                "place": island.module,
                **island.model_dump(include={"tensor", "magnitude", "reason"}),
            }
            for island in self.islands
        ]
        return folds + islands


def apply_remedies(component: str, module: "nn.Module", remedies: Remedies) -> None:
    """Change a component's module (of `export.modules.load_module`, any dtype) in place.

    In FP32 the outputs stay the same to the last bit. Raises QuantizationError for a stream or a
    submodule that the component lacks: the remedies were made for another model.
    """
    from export.folding import fold, streams
    from export.islands import make_island

    surrounding = next(module.parameters()).dtype
    found = streams(component, module)
    for remedy in remedies.folds:
        if remedy.stream not in found:
            raise QuantizationError(
                f"{component} has no residual stream {remedy.stream!r}, expected {' or '.join(found)}: "
                "scan this checkpoint again"
            )
        fold(module, found[remedy.stream], remedy.power)
    submodules = dict(module.named_modules())
    for island in remedies.islands:
        if island.module not in submodules:
            raise QuantizationError(
                f"{component} has no submodule {island.module!r}: the remedies were made for another "
                "checkpoint; scan this one"
            )
        make_island(submodules[island.module], surrounding)
