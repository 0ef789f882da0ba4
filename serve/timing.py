"""Step times that a repository may carry: what the step scheduler would decide wrongly by is refused."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmdit.errors import RepositoryError
from mmdit.family import Family
from mmdit.step_times import StepTimes


def check_step_times(tables: Iterable[StepTimes], family: Family) -> None:
    """Raise RepositoryError for a table of another model, or one that was not measured."""
    for table in tables:
        if table.model != family.name:
            raise RepositoryError(
                f"step times of {table.model}, and these engines are of {family.name}: give those that "
                "`make gpu-check MODEL=…` measured of it, or none"
            )
        if table.source != "measured":
            raise RepositoryError(
                f"step times of {table.model} from the {table.source}: lower bounds grow in proportion to "
                "the rows and say nothing of sharing calls; give what `make gpu-check` measured, or none"
            )


def measured_elsewhere(tables: Iterable[StepTimes], plans: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning for each GPU that step times were measured on, where plans were built on another."""
    built = {plan["gpu"] for plan in plans}
    return [
        f"step times measured on {gpu}, and the plans were built on {', '.join(sorted(built - {gpu}))}: "
        "calls may be shared where it does not pay there"
        for gpu in sorted({table.gpu for table in tables})
        if built - {gpu}
    ]
