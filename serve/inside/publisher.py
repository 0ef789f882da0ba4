"""Readings to Triton's Prometheus endpoint.

An update is a round trip to the server, of 30 to 140 µs, so a thread of its own makes them once a second.
"""

import threading
import traceback
from collections.abc import Callable
from typing import Any

from .metrics import Family, Readings, Series

EVERY = 1.0  # seconds
PATIENCE = 5.0  # seconds for the last publication, which a server that dies does not take


class Publisher:
    """Publishes what `read` returns every second until `close`, and once more then.

    `families` is pb_utils.MetricFamily. A metric that cannot be published is told of once, in the log; the
    others go on.
    """

    def __init__(self, read: Callable[[], Readings], families: Any) -> None:
        self._read = read
        self._families = families
        self._made: dict[Family, Any] = {}
        self._metrics: dict[Series, Any] = {}  # dropped, one would stay in the scrape with its last value
        self._published: dict[Series, float] = {}
        self._failed: set[str] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Publish what has happened up to now, and end."""
        self._closed.set()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        last = False
        while not last:
            last = self._closed.wait(EVERY)
            self._try("readings", self._publish)

    def _publish(self) -> None:
        readings = self._read()
        for series, total in readings.totals.items():
            if total != self._published.get(series):
                self._try(series[0].name, self._raise_to, series, total)
        for series, value in readings.values.items():
            if value != self._published.get(series):
                self._try(series[0].name, self._set, series, value)
        for series, value in readings.observed:
            self._try(series[0].name, self._observe, series, value)

    def _raise_to(self, series: Series, total: float) -> None:
        self._metric(series).increment(total - self._published.get(series, 0))
        self._published[series] = total

    def _set(self, series: Series, value: float) -> None:
        self._metric(series).set(value)
        self._published[series] = value

    def _observe(self, series: Series, value: float) -> None:
        self._metric(series).observe(value)

    def _metric(self, series: Series) -> Any:
        if series not in self._metrics:
            family, labels = series
            if family not in self._made:
                self._made[family] = self._families(
                    name=family.name,
                    description=family.description,
                    kind=getattr(self._families, family.kind),
                )
            options = {"buckets": list(family.buckets)} if family.buckets else {}
            self._metrics[series] = self._made[family].Metric(labels=dict(labels), **options)
        return self._metrics[series]

    def _try(self, name: str, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception:
            if name not in self._failed:
                self._failed.add(name)
                print(f"metrics: {name} cannot be published", flush=True)
                traceback.print_exc()
