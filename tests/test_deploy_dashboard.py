"""The Grafana dashboard: its queries parse, and what they name is in a real server's scrape."""

import json
import re
import time
from pathlib import Path

import promql_parser as promql
import pytest
from prometheus_scrape import Series, scrape

DASHBOARD = json.loads((Path(__file__).parent.parent / "deploy/grafana/mmdit-trt.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {"$__rate_interval": "1m", "$job": "mmdit-trt", "$instance": ".*"}
# What a scrape of a server without a GPU does not have: Triton exports these from NVML.
GPU = {"nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes", "nv_gpu_utilization"}
# Prometheus adds these labels to what it scrapes, and makes `up` itself.
ADDED = {"job": "mmdit-trt", "instance": "localhost:8002"}
# The metrics that the served models publish themselves.
OWN = re.compile(r"text_encoder_|denoiser_|text_to_image_stream_")


def parsed(query: str):
    for name, given in VARIABLES.items():
        query = query.replace(name, given)
    return promql.parse(query)


def nodes(query: str, kind: type) -> list:
    found = []
    promql.walk(parsed(query), lambda node: found.append(node) if isinstance(node, kind) else None)
    return found


def matches(matcher, labels: dict[str, str]) -> bool:
    value = labels.get(matcher.name, "")
    equal = matcher.op in (promql.MatchOp.Equal, promql.MatchOp.NotEqual)
    same = value == matcher.value if equal else re.fullmatch(matcher.value, value) is not None
    return same == (matcher.op in (promql.MatchOp.Equal, promql.MatchOp.Re))


@pytest.fixture(scope="module")
def series(server, client) -> list[tuple[str, dict[str, str]]]:
    """Of a server that has served a picture, a stream and an invalid request, as Prometheus stores them."""
    client.generate("a circle", steps=2)
    list(client.stream("a circle", steps=2))
    time.sleep(2.5)  # they are published every second
    scraped: dict[Series, float] = scrape(server.ports.metrics)
    return [("up", ADDED)] + [(name, dict(labels) | ADDED) for name, labels in scraped]


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_finds_its_metrics_and_labels(query, series):
    """Each selector some series, and each label that it groups by is one of those series'."""
    selectors = nodes(query, promql.VectorSelector)
    assert selectors
    if {selector.name for selector in selectors} <= GPU:
        return  # of a GPU, on a machine without one: it parses
    labels = set()
    for selector in selectors:
        found = [
            its
            for name, its in series
            if name == selector.name and all(matches(each, its) for each in selector.matchers.matchers)
        ]
        assert found, f"no series of {selector.prettify()}"
        for matcher in selector.matchers.matchers:
            assert all(matcher.name in its for its in found), f"{selector.name} has no label {matcher.name}"
        labels |= {name for its in found for name in its}
    for aggregation in nodes(query, promql.AggregateExpr):
        assert set(aggregation.modifier.labels if aggregation.modifier else []) <= labels


def test_every_metric_of_the_served_models_is_shown(series):
    """A histogram is, when one of its series is."""
    shown = {selector.name for query in QUERIES for selector in nodes(query, promql.VectorSelector)}
    published = {name for name, _ in series if OWN.match(name)}
    assert len(published) > 5
    family = re.compile(r"_(bucket|sum|count)$")
    assert {family.sub("", name) for name in published} == {family.sub("", n) for n in shown if OWN.match(n)}


def test_a_legend_names_labels_that_the_query_keeps():
    """What a query has summed over is gone."""
    for panel in PANELS:
        for target in panel["targets"]:
            used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            kept = {"job", "instance"}
            for aggregation in nodes(target["expr"], promql.AggregateExpr):
                kept |= set(aggregation.modifier.labels if aggregation.modifier else [])
            assert used <= kept, panel["title"]


def test_panels_do_not_overlap():
    """On a page of 24 columns."""
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_the_data_source_is_the_readers_choice():
    """And every panel says what it shows."""
    (variable,) = (each for each in DASHBOARD["templating"]["list"] if each["type"] == "datasource")
    for panel in PANELS:
        assert panel["description"]
        for each in (panel, *panel["targets"]):
            assert each["datasource"] == {"type": "prometheus", "uid": f"${{{variable['name']}}}"}


def test_panels_have_ids_of_their_own():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
