"""The asyncio client against a real server: the same pictures, streams at once, cancelling."""

import asyncio
import time

import numpy as np
import pytest
from triton_requests import rests

from mmdit.errors import DeadlineError, ServerError, UnavailableError
from serve.aio import AsyncClient, Picture, Progress


@pytest.fixture
def with_client(server):
    """Runs `work(client)` in an event loop of its own."""

    def run(work):
        async def connected():
            async with AsyncClient(f"localhost:{server.ports.grpc}") as client:
                return await work(client)

        return asyncio.run(connected())

    return run


def test_a_picture_is_the_synchronous_clients(client, with_client):
    """The same request, told in the same way."""
    expected = client.generate("a circle", seed=3, steps=3)
    picture = with_client(lambda awaited: awaited.generate("a circle", seed=3, steps=3))
    np.testing.assert_array_equal(picture.image, expected.image)
    assert (picture.seed, picture.request) == (3, expected.request)


def test_two_streams_of_one_client_run_at_once(with_client):
    """Each tells its own steps and ends with its own picture; neither waits for the other's end."""
    order = []

    async def follow(awaited, seed, steps):
        updates = []
        async for update in awaited.stream("a circle", seed=seed, steps=steps):
            order.append(seed)
            updates.append(update)
        return updates

    async def both(awaited):
        return await asyncio.gather(follow(awaited, 1, 12), follow(awaited, 2, 9))

    for seed, steps, updates in zip((1, 2), (12, 9), with_client(both), strict=True):
        assert [(each.step, each.steps) for each in updates[:-1]] == [
            (step, steps) for step in range(1, steps + 1)
        ]
        assert isinstance(updates[-1], Picture) and updates[-1].seed == seed
    assert max(order.index(1), order.index(2)) < min(len(order) - 1 - order[::-1].index(n) for n in (1, 2))


def test_leaving_the_loop_cancels_the_request(server, with_client):
    async def leave(awaited):
        async for update in awaited.stream("a circle", steps=200):
            assert isinstance(update, Progress)
            break
        assert await asyncio.to_thread(rests, server, within=2)

    with_client(leave)


def test_cancelling_the_task_cancels_the_request(server, with_client):
    async def cancel(awaited):
        begun = asyncio.Event()

        async def follow():
            async for _ in awaited.stream("a circle", steps=200):
                begun.set()

        task = asyncio.create_task(follow())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(rests, server, within=2)

    with_client(cancel)


def test_a_cancelled_picture_is_waited_for_no_longer(server, with_client):
    """The client goes on at once; the server works to the picture's time-out."""

    async def cancel(awaited):
        await awaited.generate("a circle", steps=1)
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await awaited.generate("a circle", steps=200, timeout=1)
        assert time.monotonic() - start < 0.9
        await asyncio.sleep(1)
        assert await asyncio.to_thread(rests, server, within=2)

    with_client(cancel)


@pytest.mark.parametrize("kind", ["picture", "stream"])
def test_a_bad_request_is_an_error_and_the_client_goes_on(with_client, kind):
    async def ask(awaited):
        with pytest.raises(ServerError, match="height is 120: expected a multiple of 16"):
            if kind == "picture":
                await awaited.generate("a circle", height=120)
            else:
                async for _ in awaited.stream("a circle", height=120):
                    pass
        return await awaited.generate("a circle", seed=1, steps=1)

    assert with_client(ask).seed == 1


def test_the_time_out_holds_for_pictures_and_streams(with_client):
    async def ask(awaited):
        with pytest.raises(DeadlineError):
            await awaited.generate("a circle", steps=200, timeout=0.5)
        with pytest.raises(DeadlineError):
            async for _ in awaited.stream("a circle", steps=200, timeout=0.5):
                pass

    start = time.monotonic()
    with_client(ask)
    assert time.monotonic() - start < 5


def test_no_server_is_said_in_a_sentence():
    async def ask():
        async with AsyncClient("localhost:9") as lonely:
            await lonely.generate("a circle", retries=1)

    with pytest.raises(UnavailableError, match="make serve"):
        asyncio.run(ask())


def test_a_client_is_made_inside_its_event_loop():
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient("localhost:9")
