"""Shape sets: the sizes that a repository serves, and the most rows that one `mmdit` call may carry.

One table for TensorRT's profiles, Triton's `max_batch_size` and the step scheduler. It travels in the
engines' manifests and in the packaged repository.
"""

from pydantic import BaseModel, ConfigDict, model_validator

from mmdit.errors import ContractError
from mmdit.family import VAE_SCALE, Family


class SizeRange(BaseModel):
    """Sizes in pixels, as (height, width), that share one profile; `max_rows` rows fit at `max`."""

    model_config = ConfigDict(frozen=True)

    min: tuple[int, int]
    opt: tuple[int, int]
    max: tuple[int, int]
    max_rows: int

    @model_validator(mode="after")
    def _ordered(self) -> "SizeRange":
        for low, middle, high in zip(self.min, self.opt, self.max, strict=True):
            if not 0 < low <= middle <= high:
                raise ValueError(f"a size range needs 0 < min <= opt <= max, not {self}")
        if self.max_rows < 2:
            raise ValueError(f"max_rows is {self.max_rows}: a request with guidance needs 2 rows")
        return self

    def holds(self, height: int, width: int) -> bool:
        """Whether a size in pixels lies in this range."""
        return self.min[0] <= height <= self.max[0] and self.min[1] <= width <= self.max[1]


class ShapeSet(BaseModel):
    """The sizes served. Every size is a multiple of `multiple` pixels and lies in one of `ranges`."""

    model_config = ConfigDict(frozen=True)

    name: str
    multiple: int
    ranges: tuple[SizeRange, ...]

    @property
    def max_rows(self) -> int:
        """The most rows that any call may carry."""
        return max(size_range.max_rows for size_range in self.ranges)

    @property
    def max_size(self) -> tuple[int, int]:
        """The largest height and the largest width served, in pixels."""
        heights, widths = zip(*(size_range.max for size_range in self.ranges), strict=True)
        return max(heights), max(widths)


# name → ((min, opt, max) of height and width in pixels, ...), budget in rows × tokens of one call
_SHAPE_SETS: dict[str, tuple[tuple[tuple[int, int, int], ...], int]] = {
    "any-64-256": (((64, 128, 256),), 16 * (256 + 333)),
    "square-512": (((512, 512, 512),), 16 * (1024 + 333)),
    "square-1024": (((1024, 1024, 1024),), 8 * (4096 + 333)),
}


def shape_set(family: Family, name: str | None = None) -> ShapeSet:
    """The named shape set for a family; by default the one of its own size.

    Rows follow from the set's budget of rows × (image + text tokens) at the largest size of a range.
    Raises ContractError for an unknown name or a size that the position embedding does not cover.
    """
    if name is None:
        name = "any-64-256" if family.default_size <= 256 else f"square-{family.default_size}"
    if name not in _SHAPE_SETS:
        raise ContractError(f"shape set {name!r} is unknown: expected one of {', '.join(_SHAPE_SETS)}")
    sizes, budget = _SHAPE_SETS[name]
    limit = family.max_latent * VAE_SCALE
    ranges = []
    for low, middle, high in sizes:
        if high > limit:
            raise ContractError(
                f"shape set {name!r} goes up to {high} pixels, but {family.name}'s position "
                f"embedding covers {limit}: choose a smaller set"
            )
        tokens = (high // family.size_multiple) ** 2 + family.context_tokens
        ranges.append(
            SizeRange(min=(low, low), opt=(middle, middle), max=(high, high), max_rows=budget // tokens)
        )
    return ShapeSet(name=name, multiple=family.size_multiple, ranges=tuple(ranges))
