"""A real server under mixed requests of many clients: `bench/load.py`, as many as a test has time for."""

import random

import pytest

from bench.load import PROMPTS, Load, Report, asks_of, pool_of
from bench.server_usage import MIB, Usage
from serve.launcher import running
from serve.ports import Ports

CLIENTS = 16
REQUESTS = 240  # take a minute on two cores; the 2,000 of the whole load, five
SEED = 0


@pytest.fixture(scope="module")
def report(fp16_repository, tmp_path_factory):
    """What became of the load on a server of its own, which has no other test's memory."""
    log = tmp_path_factory.mktemp("load") / "server.log"
    with running(fp16_repository, Ports.free(), log) as server:
        yield Load(server, SEED).run(REQUESTS, CLIENTS)


def test_each_request_ends_as_it_should_and_the_server_does_not_grow(report):
    """Those that nobody left have the pictures that they have alone, the malformed are refused by name."""
    print(report)
    assert not report.violations
    assert len(report.answered) + report.left + report.malformed == REQUESTS
    assert report.left and report.malformed


def test_the_load_is_what_was_asked_for():
    """Of 2,000 requests a tenth is left and a twentieth malformed; sizes, steps and guidance are mixed."""
    chance = random.Random(SEED)
    pool = pool_of(chance)
    asks = asks_of(pool, 2000, chance)
    assert 0.08 < sum(ask.left is not None for ask in asks) / 2000 < 0.12
    assert 0.035 < sum(ask.wrong is not None for ask in asks) / 2000 < 0.065
    assert 0.4 < sum(ask.streamed for ask in asks) / 2000 < 0.6
    assert {request["steps"] for request in pool} == set(range(1, 9))
    assert len({(request["height"], request["width"]) for request in pool}) > 30
    assert {request["prompt"] for request in pool} == {*PROMPTS}
    assert {request["guidance_scale"] for request in pool} == {1.0, 4.5, 7.0}
    assert any("guidance_end" in request for request in pool)
    assert len({request["seed"] for request in pool}) == len(pool)


def usage(resident: int = 800, processes: int = 11, threads: int = 450, shared: int = 26) -> Usage:
    return Usage({"triton": resident * MIB}, processes, threads, shared * MIB)


@pytest.mark.parametrize(
    ("end", "grown"),
    [
        (usage(), None),
        (usage(resident=810), None),
        (usage(resident=850), "bytes of resident memory grew"),
        (usage(processes=12), "processes grew from 11 to 12"),
        (usage(threads=500), "threads grew"),
        (usage(shared=90), "bytes of shared memory grew"),
    ],
)
def test_growth_over_the_second_half_is_a_violation(end, grown):
    report = Report(usages=[usage(resident=500), usage(), usage(), end])
    report.check_growth()
    assert [grown in each for each in report.violations] == ([] if grown is None else [True])
