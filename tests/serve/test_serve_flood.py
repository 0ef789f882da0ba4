"""More requests than the server takes: the rest are refused at once, and nobody hangs."""

import threading
import time

import numpy as np
import tritonclient.grpc as triton
from triton_requests import metric, until

FLOOD = 300
ADMITTED = 64  # that the text encoder holds, and the denoiser


def test_a_flood_is_refused_at_once_and_nobody_hangs(server, client):
    """UNAVAILABLE before any text is encoded for nothing; a picture for all others."""
    client.generate("a circle", steps=1, seed=1)  # its text is cached now
    answers: list[tuple[float, str]] = []
    all_there = threading.Event()

    def ended(result, error) -> None:
        answers.append((time.monotonic(), "picture" if error is None else f"{error.status()} {error}"))
        if len(answers) == FLOOD:
            all_there.set()

    prompt = triton.InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"a circle"], object))
    steps = triton.InferInput("steps", [1], "INT32")
    steps.set_data_from_numpy(np.array([1], np.int32))
    with triton.InferenceServerClient(f"localhost:{server.ports.grpc}") as connected:
        for _ in range(FLOOD):
            connected.async_infer("text_to_image", [prompt, steps], ended, client_timeout=300)
        sent = time.monotonic()
        assert all_there.wait(300), f"{FLOOD - len(answers)} hang"
    refused = [(when, how) for when, how in answers if how != "picture"]
    assert FLOOD - len(refused) >= ADMITTED
    assert len(refused) > ADMITTED
    assert all("UNAVAILABLE" in how for _, how in refused), set(how for _, how in refused)
    queued = sorted(when for when, how in refused if "text_encoder has" in how)
    assert queued and queued[-1] - sent < 2
    assert client.generate("a circle", steps=1, seed=1).seed == 1
    counted = 'text_encoder_requests_ended_total{outcome="refused"}'
    until(lambda: metric(server, counted) >= len(queued), within=5)
    assert metric(server, counted) == len(queued)
