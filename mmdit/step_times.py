"""What a step of one model takes on one GPU, by rows: what the serving benchmarks' stand-in engine waits."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mmdit.errors import ArtifactError, first_line


class StepTimes(BaseModel):
    """Milliseconds of one call by its rows, at `size` = (height, width) in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    model: str
    precision: str
    size: tuple[int, int]
    source: Literal["measured", "predicted"]
    milliseconds: dict[int, float]


def read(path: Path) -> StepTimes:
    """Read a table; raises ArtifactError when there is none, or none that can be read."""
    try:
        return StepTimes.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise ArtifactError(f"{path} holds no step times: {first_line(error)}") from None


def write(times: StepTimes, path: Path) -> None:
    """Write a table as JSON."""
    path.write_text(times.model_dump_json(indent=1) + "\n", encoding="utf-8")
