"""Run the tests as two pytest processes side by side, one with the real servers, one with all else.

    python tests/halves.py [options of pytest, such as -m "not slow"]

Lines of progress come at once, each with its half's number. What else pytest says comes when both have ended,
then the slowest tests of both, and one line that sums up.
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from time import monotonic
from typing import IO
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parent
SERVING = ["serve", *sorted(path.name for path in TESTS.glob("test_*.py"))]
HALVES = (
    SERVING,
    sorted(path.name for path in TESTS.iterdir() if path.is_dir() and path.name not in SERVING),
)
SLOWEST = 25
PROGRESS = re.compile(r"[.FEsxX]+ *\[ *\d+%\]$")  # pytest's line of a dot a test
NOTHING_RAN = 5  # pytest's status when a half has no test of those asked for


def follow(output: IO[str], number: int, kept: list[str]) -> None:
    """Print a half's lines of progress as they come, and keep the others."""
    for line in output:
        if PROGRESS.match(line):
            print(f"half {number}: {line}", end="", flush=True)
        else:
            kept.append(line)


def counts(report: Path) -> Counter[str]:
    """Outcome → tests, of a JUnit report."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    found = Counter({each: int(suite.get(each, 0)) for each in ("errors", "failures", "skipped")})
    found["passed"] = int(suite.get("tests", 0)) - found.total()
    return Counter({"failed": found["failures"], **found})


def slowest(reports: Iterable[Path], count: int) -> list[tuple[float, str]]:
    """(seconds with setup and teardown, name) of the slowest tests of JUnit reports, the slowest first."""
    cases = (case for report in reports for case in ElementTree.parse(report).iter("testcase"))
    times = [(float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}") for case in cases]
    return sorted(times, reverse=True)[:count]


def summary(found: Counter[str], seconds: float) -> str:
    """The closing line, in pytest's words."""
    parts = [f"{found[each]} {each}" for each in ("failed", "errors", "passed", "skipped") if found[each]]
    return f"{', '.join(parts) or 'no tests ran'} in {seconds:.2f}s"


def main(options: list[str], halves: Iterable[Iterable[str]] = HALVES) -> int:
    """Run both halves; returns 0 when all tests passed, else the first status that says why not."""
    began = monotonic()
    # Two threads of the same computation would wait for the other half's.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number, half in enumerate(halves, start=1):
            report = Path(folder) / f"{number}.xml"
            command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}"]
            process = subprocess.Popen(
                [*command, *(str(TESTS / each) for each in half)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=TESTS.parent,
                env=environment,
            )
            kept: list[str] = []
            follower = threading.Thread(target=follow, args=(process.stdout, number, kept))
            follower.start()
            running.append((process, follower, kept, report))
        statuses = []
        for process, follower, kept, _ in running:
            statuses.append(process.wait())
            follower.join()
            process.stdout.close()
            print("".join(kept), flush=True)
        reports = [report for *_, report in running if report.exists()]
        print(f"the {SLOWEST} slowest, with setup and teardown:")
        for seconds, name in slowest(reports, SLOWEST):
            print(f"{seconds:8.2f}s  {name}")
        print(summary(sum(map(counts, reports), Counter()), monotonic() - began))
    if all(status == NOTHING_RAN for status in statuses):
        return NOTHING_RAN
    return next((status for status in statuses if status not in (0, NOTHING_RAN)), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
