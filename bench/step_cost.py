"""What the server adds to a step at SD3.5 Large's tensors at 1024²: a scheduled step, and a bare `exec()`.

    python -m bench.step_cost [--out FOLDER]

One Triton server, one stand-in engine that returns at once, the two in turns.
"""

import tempfile
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

from bench import pages
from bench.repositories import for_step_cost
from mmdit.artifact import shown
from mmdit.errors import run_command
from serve.launcher import running
from serve.ports import Ports

STEPS = 20
BAR = 2.0  # ms above the bare exec()


def measure(rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of a step by round: `scheduled`, of it `engine` and `host`; `bare`, and with tensors
    `renewed` at each call."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ports = Ports.free()
        with running(for_step_cost(folder / "repository"), ports, folder / "server.log"):
            client = triton.InferenceServerClient(f"localhost:{ports.grpc}")
            inputs = []
            for name, value in (("rounds", rounds), ("steps", STEPS)):
                tensor = triton.InferInput(name, [1], "INT32")
                tensor.set_data_from_numpy(np.array([value], np.int32))
                inputs.append(tensor)
            answer = client.infer("step_cost", inputs)
            client.close()
    return {name: answer.as_numpy(name) for name in ("scheduled", "engine", "host", "bare", "renewed")}


def page_part(found: dict[str, np.ndarray]) -> str:
    """The table: medians over rounds, and the least."""
    rows = [
        ("bare `exec()`, tensors reused", found["bare"]),
        ("bare `exec()`, the latents' tensors rebuilt in each call", found["renewed"]),
        ("a step through the scheduler", found["scheduled"]),
        ("of which the engine's call, with its tensors", found["engine"]),
        ("of which the scheduler's own work", found["host"]),
        (
            f"above the bare `exec()`, tensors reused (target: ≤ {BAR:.0f} ms)",
            found["scheduled"] - found["bare"],
        ),
        ("above the bare `exec()`, tensors rebuilt in each call", found["scheduled"] - found["renewed"]),
    ]
    return pages.table(
        ["milliseconds of a step", "median", "minimum"],
        [(name, f"{np.median(values):.2f}", f"{values.min():.2f}") for name, values in rows],
    )


def main() -> None:
    """Measure, print, write the page's part."""
    given = pages.arguments("The server's cost of a step.").parse_args()
    part = page_part(measure(5 if given.quick else 40))
    page = pages.fill(given.out, "serving.md", {"step cost": part, "machine": pages.machine()})
    print(shown(page))


if __name__ == "__main__":
    run_command(main)
