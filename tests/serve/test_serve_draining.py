"""A stop lets what runs finish: real processes, real signals."""

import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as triton
from launched import launched, read_until, server_of

from mmdit.errors import ServerError
from serve import processes
from serve.client import Client, Picture


def status(port: int, path: str, data: bytes | None = None) -> int:
    """Of an HTTP request; 0 when nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/{path}", data, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_a_stop_refuses_new_requests_and_finishes_those_that_run(build, fp8_repository):
    """SIGTERM: not ready, an error for who comes now, pictures for who was there; status 0."""
    with (
        launched(build, "--grace-seconds", "200") as (process, ports),
        Client(f"localhost:{ports.grpc}") as client,
    ):
        assert status(ports.http, "health/ready") == 200
        small = {"height": 64, "width": 64, "steps": 25}
        client.generate("a circle", steps=1)  # the client knows the model before it goes
        with ThreadPoolExecutor(3) as pool:
            stream = client.stream("a circle", seed=1, **small)
            next(stream)
            unary = [pool.submit(client.generate, "a square", seed=2, **small) for _ in range(2)]
            time.sleep(0.3)  # on their way
            process.send_signal(signal.SIGTERM)
            read_until(process, "those that run get 200 s")
            deadline = time.monotonic() + 10
            for path in ("health/ready", "models/text_to_image_stream/ready"):
                while (code := status(ports.http, path)) == 200 and time.monotonic() < deadline:
                    time.sleep(0.02)
                assert code not in (0, 200)
            assert not any(each.done() for each in unary), "too fast to have been drained"
            for model in ("text_to_image", "text_to_image_stream"):
                with triton.InferenceServerClient(f"localhost:{ports.grpc}") as raw:
                    prompt = triton.InferInput("prompt", [1], "BYTES")
                    prompt.set_data_from_numpy(np.array([b"late"], object))
                    with pytest.raises(triton.InferenceServerException, match="no available versions"):
                        raw.infer(model, [prompt], client_timeout=5)
            assert [each.result().seed for each in unary] == [2, 2]
            assert isinstance(list(stream)[-1], Picture)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "cut off" not in output
    ports.check_free()


@pytest.mark.parametrize("again", [True, False])
def test_a_second_signal_or_the_end_of_the_grace_time_cuts_off(build, fp8_repository, again):
    """At once: requests that run get an error, and no shared memory stays behind."""
    options = () if again else ("--grace-seconds", "0.5")
    with launched(build, *options) as (process, ports), Client(f"localhost:{ports.grpc}") as client:
        regions = processes.regions(server_of(process))
        stream = client.stream("a circle", steps=200)
        next(stream)
        process.send_signal(signal.SIGINT)
        read_until(process, "those that run get")
        begun = time.monotonic()
        if again:
            process.send_signal(signal.SIGTERM)
        with pytest.raises(ServerError):
            list(stream)
        output, _ = process.communicate(timeout=20)
    assert time.monotonic() - begun < 3
    assert process.returncode == 0
    assert ("stopped at once" if again else "still running after 0.5 s") in output
    assert regions and not any(path.exists() for path in regions)
    ports.check_free()


def test_clients_can_neither_load_nor_unload_models(server):
    """Neither over gRPC nor over HTTP: the key is the launcher's."""
    with triton.InferenceServerClient(f"localhost:{server.ports.grpc}") as client:
        for attempt in (client.unload_model, client.load_model):
            with pytest.raises(triton.InferenceServerException, match="drain-key"):
                attempt("picture")
        assert client.is_model_ready("picture")
    for action in ("load", "unload"):
        assert status(server.ports.http, f"repository/models/picture/{action}", b"{}") == 403
    assert status(server.ports.http, "models/picture/ready") == 200
