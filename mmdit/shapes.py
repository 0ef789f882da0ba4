"""Shape sets: the sizes that a repository serves, and the most rows that one `mmdit` call may carry.

One table for TensorRT's profiles, Triton's `max_batch_size` and the step scheduler. It travels in the
engines' manifests and in the packaged repository.

Each size range becomes one optimization profile, and each profile costs an execution context: memory for
its largest shape. So a range is as wide as its budget of rows × tokens bears, and no wider:

- Listed sizes (`buckets-1mp`) share a range with their neighbours in aspect. One range over them all would
  be 1536×1536, twice the memory of any size served.
- Where every size is served (`any-256-1536`) the ranges are nested: the larger the pictures, the fewer rows.
- The first range is static, one size at the rows of a lone request, so that a CUDA graph can be captured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, model_validator

from mmdit.errors import ContractError
from mmdit.family import VAE_SCALE, Family

Size = tuple[int, int]  # (height, width) in pixels
MOST_ROWS = 16  # more rows gain nothing that a GPU shows, and their latency adds up
_USUAL_T5_TOKENS = 256
_WIDENING = 1.15  # a shared range's tokens over its largest member's, at most


class SizeRange(BaseModel):
    """Sizes in pixels, as (height, width), that share one profile; `max_rows` rows fit at `max`."""

    model_config = ConfigDict(frozen=True)

    min: Size
    opt: Size
    max: Size
    min_rows: int = 1
    opt_rows: int = 2
    max_rows: int

    @model_validator(mode="after")
    def _ordered(self) -> "SizeRange":
        for low, middle, high in zip(self.min, self.opt, self.max, strict=True):
            if not 0 < low <= middle <= high:
                raise ValueError(f"a size range needs 0 < min <= opt <= max, not {self}")
        if not 0 < self.min_rows <= self.opt_rows <= self.max_rows:
            raise ValueError(f"a size range needs 0 < min_rows <= opt_rows <= max_rows, not {self}")
        return self

    @property
    def static(self) -> bool:
        """Whether it holds one shape alone."""
        return self.min == self.max and self.min_rows == self.max_rows

    def holds(self, height: int, width: int) -> bool:
        """Whether a size in pixels lies in this range."""
        return self.min[0] <= height <= self.max[0] and self.min[1] <= width <= self.max[1]


class ShapeSet(BaseModel):
    """The sizes served: those listed, or where none is, every multiple of `multiple` pixels in a range.

    `row_tokens` is the most rows × (image and text tokens) of a call.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    multiple: int
    row_tokens: int = 0
    sizes: tuple[Size, ...] = ()
    ranges: tuple[SizeRange, ...]

    @model_validator(mode="after")
    def _serves_guidance(self) -> "ShapeSet":
        if not self.ranges or self.max_rows < 2:
            raise ValueError(f"a call carries {self.max_rows} rows at most: a request with guidance needs 2")
        return self

    @property
    def max_rows(self) -> int:
        """The most rows that any call may carry."""
        return max((size_range.max_rows for size_range in self.ranges), default=0)

    @property
    def hull(self) -> SizeRange:
        """One range of one row over all sizes, as the VAE needs it."""
        lows = [size_range.min for size_range in self.ranges]
        highs = [size_range.max for size_range in self.ranges]
        return SizeRange(
            min=(min(low[0] for low in lows), min(low[1] for low in lows)),
            opt=self.ranges[0].opt,
            max=(max(high[0] for high in highs), max(high[1] for high in highs)),
            opt_rows=1,
            max_rows=1,
        )

    def rows_at(self, height: int, width: int) -> int:
        """The most rows of a call at a size in pixels; 0 where the size is not served."""
        listed = not self.sizes or (height, width) in self.sizes
        if not listed or height % self.multiple or width % self.multiple:
            return 0
        return max((each.max_rows for each in self.ranges if each.holds(height, width)), default=0)


@dataclass(frozen=True)
class _Definition:
    """`typical` is the static profile's size; `rows` fit at `size`: the budget. Boxes, or else sizes."""

    typical: Size
    rows: int
    size: Size
    boxes: tuple[tuple[int, int, int], ...] = ()  # (min, opt, max) of height and width
    sizes: tuple[Size, ...] = ()


_SHAPE_SETS = {
    "any-64-256": _Definition((128, 128), 16, (256, 256), boxes=((64, 128, 256),)),
    "square-512": _Definition((512, 512), 16, (512, 512), sizes=((512, 512),)),
    "square-1024": _Definition((1024, 1024), 8, (1024, 1024), sizes=((1024, 1024),)),
    # The aspects of about a megapixel that SDXL made usual, and that SD3.5 was trained on too.
    "buckets-1mp": _Definition(
        (1024, 1024),
        8,
        (1152, 1024),
        sizes=(
            *((1536, 640), (1344, 768), (1216, 832), (1152, 896), (1024, 1024)),
            *((896, 1152), (832, 1216), (768, 1344), (640, 1536)),
        ),
    ),
    "any-256-1536": _Definition(
        (1024, 1024),
        8,
        (1024, 1024),
        boxes=((256, 512, 512), (256, 1024, 1024), (256, 1536, 1536)),
    ),
}
NAMES = tuple(_SHAPE_SETS)


def shape_set(family: Family, name: str | None = None) -> ShapeSet:
    """The named shape set for a family; by default the one of its own size.

    Raises ContractError for an unknown name or a size that the position embedding does not cover.
    """
    if name is None:
        name = "any-64-256" if family.default_size <= 256 else f"square-{family.default_size}"
    if name not in _SHAPE_SETS:
        raise ContractError(f"shape set {name!r} is unknown: expected one of {', '.join(NAMES)}")
    definition = _SHAPE_SETS[name]
    usual = family.model_copy(
        update={"t5_tokens": _USUAL_T5_TOKENS}
    )  # longer texts leave room for fewer rows
    budget = definition.rows * tokens(usual, definition.size)
    limit = family.max_latent * VAE_SCALE
    largest = _largest(definition)
    if largest > limit:
        smaller = [other for other, each in _SHAPE_SETS.items() if _largest(each) <= limit]
        raise ContractError(
            f"shape set {name!r} goes up to {largest} pixels, but {family.name}'s position "
            f"embedding covers {limit}: choose {' or '.join(smaller) or 'another model'}"
        )
    boxes = [((low, low), (opt, opt), (high, high)) for low, opt, high in definition.boxes]
    boxes = boxes or _shared(family, definition.sizes)
    lone = 2 if family.guidance_scale > 1 else 1
    typical = definition.typical
    ranges = [SizeRange(min=typical, opt=typical, max=typical, min_rows=lone, opt_rows=lone, max_rows=lone)]
    for low, opt, high in boxes:
        rows = min(MOST_ROWS, budget // tokens(family, high))
        ranges.append(SizeRange(min=low, opt=opt, max=high, opt_rows=rows, max_rows=rows))
    return ShapeSet(
        name=name,
        multiple=family.size_multiple,
        row_tokens=budget,
        sizes=definition.sizes,
        ranges=tuple(ranges),
    )


def _largest(definition: _Definition) -> int:
    sides = [side for size in definition.sizes for side in size]
    return max(sides + [high for _, _, high in definition.boxes])


def tokens(family: Family, size: Size) -> int:
    """The tokens of one row, image and text, at a size in pixels."""
    height, width = size
    return (height // family.size_multiple) * (width // family.size_multiple) + family.context_tokens


def _shared(family: Family, sizes: Sequence[Size]) -> list[tuple[Size, Size, Size]]:
    """Sizes by aspect, cut into the fewest boxes that are not much larger than their largest member.

    Among the cuts into equally many, the one that reserves least over what its sizes need.
    """
    ordered = sorted(sizes, key=lambda size: size[0] / size[1], reverse=True)
    best: list[tuple[int, int, list[tuple[Size, Size, Size]]]] = [(0, 0, [])]  # of the first n sizes
    for end in range(1, len(ordered) + 1):
        options = []
        for start in range(end):
            members = ordered[start:end]
            heights, widths = zip(*members, strict=True)
            opt = max(members, key=lambda size: tokens(family, size))
            low, high = (min(heights), min(widths)), (max(heights), max(widths))
            needed = [tokens(family, member) for member in members]
            reserved = tokens(family, high)
            if reserved <= _WIDENING * max(needed):
                boxes, spare, chosen = best[start]
                spare += len(members) * reserved - sum(needed)
                options.append((boxes + 1, spare, [*chosen, (low, opt, high)]))
        best.append(min(options, key=lambda option: option[:2]))
    return best[-1][2]
