"""Two pytest processes as one run: nothing is left out, and a failure in either half is the whole's."""

import subprocess
import sys
from pathlib import Path

import pytest
from halves import HALVES, main

TESTS = Path(__file__).resolve().parent


def test_each_file_of_tests_is_in_one_half():
    found = [file for half in HALVES for each in half for file in files(TESTS / each)]
    assert sorted(found) == sorted(TESTS.rglob("test_*.py"))


def files(path: Path) -> list[Path]:
    return sorted(path.rglob("test_*.py")) if path.is_dir() else [path]


@pytest.mark.parametrize(
    ("one", "other", "status", "line"),
    [
        ("assert True", "assert True", 0, "2 passed in "),
        ("assert True", "assert False", 1, "1 failed, 1 passed in "),
        ("assert False", "assert True", 1, "1 failed, 1 passed in "),
    ],
)
def test_the_last_line_sums_up(one, other, status, line, tmp_path, capsys):
    paths = []
    for name, body in (("one", one), ("other", other)):
        path = tmp_path / f"test_{name}.py"
        path.write_text(f"def test_{name}():\n    {body}\n")
        paths.append([str(path)])
    assert main(["-q", "-p", "no:cacheprovider"], paths) == status
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith(line)
    assert printed.count("::test_") >= 2
    assert {line[:7] for line in printed.splitlines() if line.endswith("[100%]")} == {"half 1:", "half 2:"}


def test_a_half_that_cannot_be_collected_fails_the_whole(tmp_path, capsys):
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "test_whole.py").write_text("def test_whole():\n    pass\n")
    halves = [[str(tmp_path / "test_broken.py")], [str(tmp_path / "test_whole.py")]]
    assert main(["-p", "no:cacheprovider"], halves) != 0
    assert "1 errors, 1 passed" in capsys.readouterr().out.splitlines()[-1]


def test_a_half_that_is_killed_fails_the_whole(tmp_path):
    """By hand, since a process that dies writes no report."""
    (tmp_path / "test_dies.py").write_text("import os\n\n\ndef test_dies():\n    os._exit(3)\n")
    (tmp_path / "test_whole.py").write_text("def test_whole():\n    pass\n")
    code = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r}); from halves import main;"
        f"sys.exit(main([], [[{str(tmp_path / 'test_dies.py')!r}], [{str(tmp_path / 'test_whole.py')!r}]]))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 3
