"""Tables of milliseconds by rows: written by whoever measures, read by whoever simulates."""

import json

import pytest

from mmdit.errors import ArtifactError
from mmdit.step_times import StepTimes, read, write

TABLE = {
    "gpu": "H100 80 GB",
    "model": "sd35-large",
    "precision": "fp8",
    "size": [1024, 1024],
    "source": "measured",
    "milliseconds": {"1": 20.5, "2": 40.0},
}


def test_a_table_reads_back_as_it_was_written(tmp_path):
    """JSON's keys are text; rows are numbers."""
    times = StepTimes.model_validate(TABLE)
    write(times, tmp_path / "times.json")
    assert read(tmp_path / "times.json") == times
    assert times.milliseconds[2] == 40.0
    assert json.loads((tmp_path / "times.json").read_text()) == TABLE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("milliseconds", {}),
        ("milliseconds", {"0": 1.0}),
        ("milliseconds", {"2": 0.0}),
        ("milliseconds", {"2": "nan"}),
        ("source", "guessed"),
        ("size", [1024]),
    ],
)
def test_what_is_no_table_is_refused_with_the_place(tmp_path, field, value):
    """An engine that stands in with no time, or none for any rows, would measure nothing."""
    file = tmp_path / "times.json"
    file.write_text(json.dumps(TABLE | {field: value}))
    with pytest.raises(ArtifactError, match=rf"times.json is no table of step times: {field}"):
        read(file)


def test_a_missing_table_is_an_error_of_one_line(tmp_path):
    """Not a traceback."""
    with pytest.raises(ArtifactError, match="does not exist"):
        read(tmp_path / "none.json")
