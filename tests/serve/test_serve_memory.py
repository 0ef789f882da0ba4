"""What a server needs beyond its engines: computed shared memory beside a real server's, and its sizes."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from mmdit.artifact import read_manifest
from mmdit.shapes import NAMES, shape_set
from serve.client import Client
from serve.launcher import running
from serve.ports import Ports
from serve.processes import regions
from serve.server_memory import MIB, cuda_pool, shared_memory

MANY = {"requests": 64, "streams": 16, "prompts": 2 * 64 * 8192}  # the policies of model_repository/


def in_use(server) -> int:
    """The bytes of all shared-memory regions that the server's model processes have mapped."""
    return sum(region.stat().st_size for region in regions(server._process.pid))


def test_a_real_server_stays_within_the_computed_shared_memory(fp16_repository, tmp_path):
    """With as many of the largest pictures streamed and asked for at once as its policies admit.

    Within less than three times, too: a figure that nothing comes near would say nothing.
    """
    computed = read_manifest(fp16_repository).findings["shared_memory_bytes"]
    size = {"height": 256, "width": 256, "steps": 2}
    with (
        running(fp16_repository, Ports.free(), tmp_path / "server.log") as server,
        Client(f"localhost:{server.ports.grpc}") as client,
        ThreadPoolExecutor(64) as pool,
    ):
        started = in_use(server)

        def ask(number: int) -> object:
            if number % 4:
                return client.generate(f"a cross {number}", **size)
            return list(client.stream(f"a circle {number}", preview_every=1, preview_with_vae=True, **size))

        list(pool.map(ask, range(64)))
        measured = in_use(server)
    assert started == 10 * MIB
    assert computed / 3 < measured <= computed


@pytest.mark.parametrize("name", NAMES)
def test_large_needs_more_shared_memory_than_docker_gives(large, name):
    """The contexts of the requests in the denoiser alone, [2, 333, 4096] in FP16 each, are 349 MB."""
    shapes = shape_set(large, name)
    needed = shared_memory(large, shapes, "tensorrt", **MANY)
    contexts = 64 * 2 * 333 * 4096 * 2
    assert 64 * MIB < contexts < needed < 4 << 30
    fewer = shared_memory(large, shapes, "tensorrt", **MANY | {"requests": 8})
    assert needed - fewer > 56 * 2 * 333 * 4096 * 2


@pytest.mark.parametrize("name", NAMES)
def test_the_cuda_pool_holds_two_calls_pictures(large, name):
    """FP16 [3, H, W] each; never less than Triton's own 64 MiB."""
    shapes = shape_set(large, name)
    pictures = [each.max_rows * 3 * each.max[0] * each.max[1] * 2 for each in shapes.ranges]
    assert cuda_pool(large, shapes) >= max(64 * MIB, 2 * max(pictures))
