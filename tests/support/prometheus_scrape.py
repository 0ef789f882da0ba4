"""A Prometheus endpoint's text as data."""

import re
import urllib.request

Series = tuple[str, frozenset[tuple[str, str]]]  # a metric's name and its labels

_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def scrape(port: int) -> dict[Series, float]:
    """Every series at this moment."""
    with urllib.request.urlopen(f"http://localhost:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = [_LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    return {
        (name, frozenset(_LABEL.findall(labels or ""))): float(value)
        for name, labels, value in map(_groups, found)
    }


def value(series: dict[Series, float], name: str, **labels: str) -> float:
    """The sum of a metric's series that have the labels; 0 when there are none."""
    return sum(each for (found, its), each in series.items() if found == name and labels.items() <= set(its))


def _groups(match: re.Match[str] | None) -> tuple[str, str | None, str]:
    assert match is not None
    return match.groups()  # type: ignore[return-value]
