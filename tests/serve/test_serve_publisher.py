"""The thread that takes readings to Triton, with metric families that remember what they are told."""

import time

from stand_in_engine import request
from test_serve_metrics import limits

from serve.inside.metrics import LoopMetrics
from serve.inside.publisher import Publisher
from serve.inside.request import Request


class Families:
    """pb_utils.MetricFamily: what is published, by metric; `broken` families raise."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, broken: set[str] = frozenset()) -> None:
        self.broken = broken
        self.numbers: dict[str, list[float]] = {}

    def __call__(self, name, description, kind):
        self.name = name
        return FamilyOf(self, name)


class FamilyOf:
    def __init__(self, families: Families, name: str) -> None:
        self.families, self.name = families, name

    def Metric(self, labels, buckets=()):
        return self

    def increment(self, amount: float) -> None:
        if self.name in self.families.broken:
            raise RuntimeError(f"{self.name} is broken")
        self.families.numbers.setdefault(self.name, []).append(amount)

    set = observe = increment


def published(monkeypatch, metrics: LoopMetrics, families: Families, *calls: list[Request]) -> Families:
    """What has come there after calls of two rows a request, each with a publication of its own."""
    monkeypatch.setattr("serve.inside.publisher.EVERY", 0.02)
    publisher = Publisher(lambda: metrics.read({}), families)
    for call in calls:
        metrics.called(call, 2 * len(call), 0.0, 0.1, 0.0)
        time.sleep(0.2)
    publisher.close()
    return families


def test_counters_rise_by_what_is_new(monkeypatch):
    metrics = LoopMetrics(limits())
    families = published(monkeypatch, metrics, Families(), [request()] * 3, [request()])
    assert families.numbers["denoiser_steps_total"] == [3, 1]
    assert families.numbers["denoiser_call_rows"] == [6, 2]


def test_what_happened_last_is_published_before_the_end():
    metrics, families = LoopMetrics(limits()), Families()
    publisher = Publisher(lambda: metrics.read({}), families)
    metrics.called([request()], 2, 0.0, 0.1, 0.0)
    publisher.close()
    assert families.numbers["denoiser_steps_total"] == [1]


def test_a_metric_that_fails_is_told_of_once_and_the_others_go_on(monkeypatch, capfd):
    metrics = LoopMetrics(limits())
    broken = Families({"denoiser_steps_total"})
    families = published(monkeypatch, metrics, broken, [request()], [request()])
    assert families.numbers["denoiser_call_rows"] == [2, 2]
    assert capfd.readouterr().out.count("denoiser_steps_total cannot be published") == 1
