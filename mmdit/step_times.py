"""Milliseconds of one `mmdit` call by its rows: measured on a GPU, or the roofline's lower bound.

A table is a small JSON file. `make gpu-check` and `make gpu-reference` write what they measure; the packager
hands what was measured to the step scheduler, and simulated engines take their times from either:

    {"gpu": "H100 80 GB", "model": "sd35-large", "precision": "fp8", "size": [1024, 1024],
     "source": "roofline", "milliseconds": {"1": 19.4, "2": 38.8, "4": 77.6}}
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmdit.errors import ArtifactError
from mmdit.shapes import Size


class StepTimes(BaseModel):
    """One model on one GPU at one size in pixels, as (height, width).

    `precision` says in words what ran, such as "fp8" or "bf16, torch.compile"; `milliseconds` by rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    model: str
    precision: str
    size: Size
    source: Literal["roofline", "measured"]
    milliseconds: dict[Annotated[int, Field(gt=0)], Annotated[float, Field(gt=0, allow_inf_nan=False)]] = (
        Field(min_length=1)
    )


def read(path: Path) -> StepTimes:
    """The table in a JSON file. Raises ArtifactError for a file that holds none."""
    try:
        return StepTimes.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} does not exist: expected a table of rows and milliseconds in JSON"
        ) from None
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"])) or "the file"
        raise ArtifactError(
            f"{path} is no table of step times: {place}: {wrong['msg']}; mmdit/step_times.py shows the form"
        ) from None


def write(times: StepTimes, path: Path) -> None:
    """Write a table as JSON."""
    path.write_text(times.model_dump_json(indent=1) + "\n", encoding="utf-8")
