"""The costs of all components of one model, at several sizes: what the roofline and the planner compute with.

From the ONNX files of a model; or from a file of a few kilobytes that has been computed once, as for the
published models in docs/measurements.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from engines.checks.graph import load
from engines.forecast.costs import Costs, costs
from engines.source import Source
from mmdit.artifact import MEASUREMENTS
from mmdit.contract import Precision, components, dims_at, dims_vary
from mmdit.errors import ArtifactError, first_line
from mmdit.family import Family
from mmdit.shapes import ShapeSet, Size, shape_set

PUBLISHED = ("medium", "large")  # SD3.5's geometries whose costs lie in docs/measurements


class Entry(BaseModel):
    """One row of a component at a size in pixels; `size` is None where it does not depend on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: str
    precision: Precision
    size: Size | None
    row: Costs


class ModelCosts(BaseModel):
    """A family and the costs of its components."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Family
    entries: tuple[Entry, ...]

    def at(self, component: str, size: Size, precision: Precision = Precision.FP16) -> Costs:
        """One row of a component; of all but the MMDiT the precision is FP16.

        Raises ArtifactError for what was not computed.
        """
        for entry in self.entries:
            if (entry.component, entry.precision) == (component, precision) and entry.size in (None, size):
                return entry.row
        height, width = size
        raise ArtifactError(
            f"{self.family.name}: no costs of {component} in {precision.value} at {height}×{width}"
        )


def model_costs(found: Iterable[Source], family: Family, sizes: Sequence[Size]) -> ModelCosts:
    """The costs of a model's ONNX files; takes seconds for each size of a full-size MMDiT."""
    signatures = components(family, shape_set(family))
    entries = []
    for source in found:
        signature = signatures[source.component]
        model = load(source.onnx, source.component)
        for size in sizes if dims_vary(signature) else (None,):
            inputs = {tensor.name: (1, *dims_at(tensor, size or (0, 0))) for tensor in signature.inputs}
            row = costs(model, inputs)
            entries.append(Entry(component=source.component, precision=source.precision, size=size, row=row))
    return ModelCosts(family=family, entries=tuple(entries))


def sizes_planned(shapes: ShapeSet) -> list[Size]:
    """The sizes whose costs the planner asks for: each profile's largest."""
    return sorted({shapes.hull.max, *(each.max for each in shapes.ranges)})


def costs_file(model: str) -> Path:
    """Where the costs of a published model lie."""
    return MEASUREMENTS / f"costs-{model}.json"


def published() -> list[ModelCosts]:
    """The costs of SD3.5 Medium and Large, from their published geometry."""
    return [read_costs(costs_file(model)) for model in PUBLISHED]


def read_costs(path: Path) -> ModelCosts:
    """The costs in a file. Raises ArtifactError for one that holds none."""
    try:
        return ModelCosts.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(f"{path} holds no model's costs: {first_line(error)}") from None


def write_costs(found: ModelCosts, path: Path) -> None:
    """Write costs as JSON, one entry a line."""
    lines = ",\n".join(entry.model_dump_json() for entry in found.entries)
    path.write_text(
        f'{{"family": {found.family.model_dump_json()},\n"entries": [\n{lines}]}}\n', encoding="utf-8"
    )
