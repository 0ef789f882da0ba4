"""The benchmarks' own figures: what a peer does, what a table says, how a page is filled."""

import importlib

import numpy as np
import pytest

from bench import pages
from bench.curves import LINEAR, ONE, STEPS, SUB_LINEAR, UNTOLD, WHOLE, measured, roofline
from bench.perf_analyzer import Load, load_from
from bench.requests import requests
from bench.scheduling import asked_and_found, at_load, most, point, points
from bench.serving import looped, queued
from bench.simulation import Arrival, closed_loop, poisson, serve_whole
from mmdit.errors import ArtifactError, ServerError
from mmdit.step_times import StepTimes, write

SMALL, WIDE = (4, 4), (6, 4)


def ten_a_row(rows: int) -> float:
    """A curve to reckon with in one's head."""
    return 10.0 * rows


def whole(*arrivals: Arrival, most: int = 4) -> list[float]:
    return serve_whole(arrivals, ten_a_row, lambda size: most).latencies


def test_whole_requests_that_wait_go_together_up_to_the_rows():
    """The first goes alone, 2 steps of 20 ms; two of the three that came meanwhile fit: 2 × 40 ms."""
    came = [Arrival(at, rows=2, steps=2) for at in (0, 5, 6, 7)]
    assert whole(*came) == [40, 40 + 80 - 5, 40 + 80 - 6, 120 + 40 - 7]


def test_whole_requests_of_another_size_or_length_wait_for_the_next_batch():
    """The oldest decides what is batched; the others keep their order."""
    came = [
        Arrival(0, steps=1),
        Arrival(1, SMALL, steps=1),
        Arrival(2, WIDE, steps=1),
        Arrival(3, SMALL, steps=3),
        Arrival(4, SMALL, steps=1),
    ]
    # 0–20 the first; 20–60 the second and the fifth; 60–80 the wide one; 80–140 the long one
    assert whole(*came) == [20, 60 - 1, 60 - 4, 80 - 2, 140 - 3]


def test_a_batch_keeps_the_order_of_arrival_when_the_next_does_not_fit():
    """A single row does not overtake a pair."""
    came = [
        Arrival(0, rows=2, steps=1),
        *(Arrival(1 + n, rows=rows, steps=1) for n, rows in enumerate((3, 2, 1))),
    ]
    # 0–20; three rows alone until 50; the pair and the single row until 80
    assert whole(*came) == [20, 50 - 1, 80 - 2, 80 - 3]


def test_an_engine_without_requests_waits_for_the_next():
    """Idle time is no latency."""
    assert whole(Arrival(0, steps=1), Arrival(1000, steps=1)) == [20, 20]


def test_the_scheduler_told_that_nothing_is_gained_is_the_queue_of_the_peer():
    """Two programs, one policy: the same latencies."""
    arrivals = poisson(0.8 / LINEAR.alone, 60)
    queue = LINEAR.serving(ONE, arrivals).latencies
    assert LINEAR.serving(STEPS, arrivals).latencies == pytest.approx(queue)
    assert np.mean(LINEAR.serving(UNTOLD, arrivals).latencies) > 1.2 * np.mean(queue)


def test_the_most_throughput_is_that_of_full_calls():
    """Eight requests share 52 ms: 8 × 24 / 52, less what the last pictures leave empty."""
    assert most(SUB_LINEAR, STEPS) == pytest.approx(8 * 24 / 52, rel=0.02)
    assert most(SUB_LINEAR, WHOLE) == pytest.approx(8 * 24 / 52, rel=0.03)
    assert most(SUB_LINEAR, ONE) == pytest.approx(1)


def test_the_servers_own_work_slows_a_queue_down():
    """2 ms between calls of 38.8, since only one is in flight."""
    assert most(LINEAR, STEPS, host_ms=2.0) == pytest.approx(38.8 / 40.8, rel=0.001)


def test_a_load_is_exact_in_each_sample():
    """So that 90 % is not 104 % by chance."""
    arrivals = at_load(SUB_LINEAR, 0.9, 50, seed=3)
    assert arrivals[-1].at / 1000 == pytest.approx(50 * SUB_LINEAR.alone / 0.9)


def test_every_curve_policy_and_load_has_its_own_point():
    """In order; where all rows are worth sharing a table changes nothing."""
    found = points([SUB_LINEAR, LINEAR], (0.2, 0.6), seeds=1, count=20)
    keys = [(each.curve, each.policy, each.load) for each in found]
    assert keys == [
        (c, p, x) for c in (SUB_LINEAR, LINEAR) for p in (ONE, WHOLE, STEPS, UNTOLD) for x in (0.2, 0.6)
    ]
    table = dict(zip(keys, found, strict=True))
    assert table[SUB_LINEAR, UNTOLD, 0.6].p95 == table[SUB_LINEAR, STEPS, 0.6].p95
    assert table[LINEAR, UNTOLD, 0.6].p95 > table[LINEAR, STEPS, 0.6].p95
    assert table[LINEAR, STEPS, 0.6] == point(LINEAR, STEPS, 0.6, 1, 20)


def test_what_cannot_be_served_is_said_not_to_keep_up():
    """Twice what one at a time can do."""
    assert not point(SUB_LINEAR, ONE, 2.0, 1, 60).keeps_up
    assert point(SUB_LINEAR, STEPS, 2.0, 1, 60).keeps_up


def test_the_page_shows_what_the_issue_asked_and_all_of_it_is_met():
    """The same figures that tests/serve/test_serve_load.py holds."""
    for what, asked, found in asked_and_found():
        sign, bar = asked.split()
        assert float(found) >= float(bar) if sign == "≥" else float(found) <= float(bar), what


def test_the_roofline_leaves_no_room_for_a_second_request():
    """Eight engines; of each the price of a second request is above nine tenths, so none is shared."""
    engines = roofline()
    assert [each.name for each in engines][:2] == ["Medium, 512², FP8", "Medium, 512², FP16"]
    assert len(engines) == 8
    assert all(0.9 < each.price <= 1 and each.worth <= 2 for each in engines)


def test_a_measured_table_becomes_an_engine(tmp_path):
    """What `make gpu-check` writes."""
    times = StepTimes(
        gpu="H200",
        model="sd35-medium",
        precision="fp8",
        size=(512, 512),
        source="measured",
        milliseconds={2: 6.0, 4: 7.5, 8: 10.5},
    )
    write(times, tmp_path / "times.json")
    engine = measured(tmp_path / "times.json")
    assert (engine.name, engine.most, engine.price) == ("sd35-medium, 512×512, fp8, H200", 8, 0.25)
    assert engine(6) == 9.0


def test_throughput_counts_while_every_client_has_more_to_ask():
    """Two clients, pictures of 1 s in turns: the last request begins at 3 s, and the drain does not count."""
    load = Load(np.array([0.0, 0.0, 1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0, 9.0]))
    assert load.pictures_per_second == 1.0
    assert load.percentile(50) == 2.0


def test_requests_queue_for_diffusers_pictures():
    """Pictures of 1 s and 3 s; the second request waits for the first one's end."""
    assert queued([1.0, 3.0], [0.0, 0.5, 10.0]).latencies.tolist() == [1.0, 3.5, 1.0]
    closed = looped([1.0], clients=2, pictures=4)
    assert closed.ends.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert closed.latencies.tolist() == [1.0, 2.0, 2.0, 2.0]
    assert closed_loop(
        2, lambda arrivals, again: serve_whole(arrivals, ten_a_row, lambda size: 2, again=again)
    ).end


def recorded(prompt: str, *ends: int) -> dict[str, object]:
    return {"timestamp": 10**9, "request_inputs": {"prompt": prompt}, "response_timestamps": list(ends)}


def test_a_record_with_a_failed_request_or_a_cached_prompt_is_refused():
    """A figure over failures would flatter."""
    assert load_from([recorded("a", 3 * 10**9), recorded("b", 2 * 10**9)], 2).ends.tolist() == [2.0, 1.0]
    with pytest.raises(ServerError, match="1 of 2 requests were answered"):
        load_from([recorded("a", 2), recorded("b")], 2)
    with pytest.raises(ServerError, match="of 1 prompts"):
        load_from([recorded("a", 2), recorded("a", 3)], 2)
    assert len({each["prompt"] for each in requests(range(50))}) == 50


def test_a_page_gets_its_tables_and_keeps_its_words(tmp_path, monkeypatch):
    """Filled twice, the second table stands in the first one's place."""
    monkeypatch.setattr(pages, "PAGES", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "x.md").write_text("before\n<!-- a -->\n<!-- /a -->\nafter\n")
    for number in (1, 2):
        page = pages.fill(tmp_path / "out", "x.md", {"a": pages.table(["n", "m"], [("x", number)])})
    assert page.read_text() == "before\n<!-- a -->\n\n| n | m |\n|---|--:|\n| x | 2 |\n\n<!-- /a -->\nafter\n"
    with pytest.raises(ArtifactError, match="no place <!-- b -->"):
        pages.fill(tmp_path / "out", "x.md", {"b": ""})


@pytest.mark.parametrize(
    "name", ["lone", "real_scheduling", "scheduling_charts", "serving_chart", "step_cost", "repositories"]
)
def test_the_benchmarks_can_be_imported(name):
    """`make bench` runs them."""
    assert importlib.import_module(f"bench.{name}")
