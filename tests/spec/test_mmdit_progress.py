"""Progress in a log: what is done, how long the rest takes, and where an earlier run stopped."""

import pytest

from mmdit import progress
from mmdit.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_what_an_earlier_run_did_counts_as_done_but_took_no_time(clock, capsys):
    with Progress("training", 100, "steps") as bar:
        bar.start_at(40)
        clock[0] = 20.0
        bar.update(50)
        assert capsys.readouterr().err == "training: 50/100 steps, 100 s left\n"


def test_work_that_ends_early_says_how_far_it_came(clock, capsys):
    with Progress("training", 100, "steps") as bar:
        bar.update(30)
        bar.note = "loss 0.5"
        bar.stop()
    assert capsys.readouterr().err == "training: 30/100 steps, 0.0 s, loss 0.5\n"


def test_work_that_ends_is_done_to_its_last_unit(clock, capsys):
    with Progress("work", 3):
        pass
    assert capsys.readouterr().err == "work: 3/3, 0.0 s\n"


def test_units_that_are_worked_on_together_promise_no_time(clock, capsys):
    """The first of eight pictures ends when nearly all do: seven times as long again would be wrong."""
    with Progress("pictures", 8, together=True) as bar:
        clock[0] = 12.0
        bar.advance()
        assert capsys.readouterr().err == "pictures: 1/8\n"
