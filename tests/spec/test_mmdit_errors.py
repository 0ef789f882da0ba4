"""How a command ends, and how long work shows that it goes on."""

import io
import re
import sys

import pytest

from mmdit import errors, progress
from mmdit.errors import MmditError, first_line, run_command
from mmdit.progress import Progress


def ended(main) -> int:
    with pytest.raises(SystemExit) as exit_status:
        run_command(main)
    return exit_status.value.code


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (3, 3)])
def test_a_commands_result_is_its_exit_status(result, status, capsys):
    """Nothing returned is success."""
    assert ended(lambda: result) == status
    assert capsys.readouterr() == ("", "")


TREE = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, MmditError)]


@pytest.mark.parametrize("error", TREE)
def test_a_users_error_ends_with_status_2_and_one_line(error, capsys):
    """Every exception of the tree; no traceback."""
    assert ended(raising(error("x is 3, expected 4: set x"))) == 2
    assert capsys.readouterr() == ("", "error: x is 3, expected 4: set x\n")


def test_the_docstring_draws_the_whole_tree():
    """A new exception is drawn where the others are."""
    assert errors.__doc__ is not None
    drawn = set(re.findall(r"\b\w+Error\b", errors.__doc__))
    assert drawn == {error.__name__ for error in TREE}


def test_ctrl_c_ends_with_status_130(capsys):
    """As shells expect."""
    assert ended(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_went_away_is_no_traceback(monkeypatch):
    """`python -m export … | head`."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert ended(raising(BrokenPipeError())) == 1
    assert stderr.closed


def test_a_mistake_of_ours_keeps_its_traceback():
    """Only a user's error is made short."""
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


def test_the_first_line_of_an_error_is_never_empty():
    """Libraries raise errors of many lines, and of none."""
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when the test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_progress_in_a_log_is_a_line_every_ten_seconds(capsys, clock):
    """With the time that is left; at the end, the time it took."""
    with Progress("tracing", 9, "layers") as bar:
        for _ in range(9):
            clock(6)
            bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        "tracing: 2/9 layers, 42 s left",
        "tracing: 4/9 layers, 30 s left",
        "tracing: 6/9 layers, 18 s left",
        "tracing: 8/9 layers, 6 s left",
        "tracing: 9/9 layers, 54.0 s",
    ]


def test_progress_on_a_terminal_is_one_line_redrawn(monkeypatch, clock):
    """A bar that fills, at most ten times a second, and a newline at the end."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("hashing", 100, "MB") as bar:
        for _ in range(100):
            clock(0.0625)
            bar.advance()
    text = terminal.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    drawn = text.strip().split("\r")
    assert 50 <= len(drawn) <= 52
    assert drawn[-1].endswith("█" * 24 + " hashing: 100/100 MB, 6.2 s")


def test_progress_that_an_error_ends_claims_no_success(capsys, monkeypatch):
    """The error's line stands on a line of its own."""
    with pytest.raises(ValueError), Progress("tracing", 3):
        raise ValueError
    assert "3/3" not in capsys.readouterr().err
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(ValueError), Progress("tracing", 3):
        raise ValueError
    assert terminal.getvalue().endswith("\n")


def test_progress_over_nothing_ends(capsys):
    """No division by zero."""
    with Progress("hashing", 0):
        pass
    assert "hashing: 1/1" in capsys.readouterr().err
