"""One training: steps that can stop and resume anywhere, its losses, its curve, its samples.

After N steps the state is the same however often it was stopped: what a step draws at random comes
from the seed and the step's number alone.
"""

import fcntl
import hashlib
import io
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from miniature.curve import draw_curve
from mmdit.artifact import shown
from mmdit.errors import CheckpointError, MmditError
from mmdit.progress import Progress

SAVE_SECONDS = 60.0
DIGEST_BYTES = 32


class Stage(Protocol):
    """What is trained: the VAE, or the MMDiT with its text encoders."""

    name: str
    steps: int
    sample_every: int
    settings: dict[str, Any]

    def step(self, number: int) -> float:
        """Take one optimizer step and return its loss."""

    def state(self) -> dict[str, Any]:
        """Everything that `load` needs to go on from here."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""

    def sample(self, path: Path) -> dict[str, float]:
        """Write a picture that shows how far it is, and return the scores to plot."""


def train(stage: Stage, folder: Path, *, seed: int, deadline: float) -> bool:
    """Train `stage` until `deadline` (of time.monotonic); whether it has reached its last step.

    The state lies in `folder/<stage>.pt`, written every minute, at the end, and on SIGINT or SIGTERM.
    Raises CheckpointError when the state that lies there is damaged or of another training, and
    MmditError, keeping the last good state, when the loss is no longer a number.
    """
    path = folder / f"{stage.name}.pt"
    settings = {"stage": stage.name, "seed": seed, "steps": stage.steps, **stage.settings}
    done, losses, scores, seconds = 0, [], [], 0.0
    if path.exists():
        found = read_state(path)
        if found["settings"] != settings:
            raise CheckpointError(
                f"{path} belongs to another training ({_difference(found['settings'], settings)}): "
                "give the settings it was started with, or choose another folder"
            )
        stage.load(found["stage"])
        done, losses, scores, seconds = (found[key] for key in ("step", "losses", "scores", "seconds"))
        if done == stage.steps:
            return True
        print(f"{shown(path)}: resumes at step {done} of {stage.steps}, after {seconds / 60:.0f} minutes")

    def save() -> None:
        write_state(
            path,
            {
                "settings": settings,
                "stage": stage.state(),
                "step": done,
                "losses": losses,
                "scores": scores,
                "seconds": seconds,
            },
        )

    begin = saved = time.monotonic()
    before = seconds
    with _stop_at_a_step() as stopped, Progress(stage.name, stage.steps, "steps") as progress:
        progress.start_at(done)
        while done < stage.steps and not stopped and time.monotonic() < deadline:
            torch.manual_seed(seed * 1_000_003 + done)
            losses.append(stage.step(done))
            if not math.isfinite(losses[-1]):
                raise MmditError(f"the loss of {stage.name} is {losses[-1]} at step {done}: lower its rates")
            done += 1
            seconds = before + time.monotonic() - begin
            progress.note = f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}"
            progress.update(done)
            if done % stage.sample_every == 0 or done == stage.steps:
                scores.append({"step": done, **stage.sample(folder / f"{stage.name}-{done:06d}.png")})
                draw_curve(stage.name, losses, scores, folder / f"{stage.name}.png")
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
        if done < stage.steps:
            progress.stop()
    save()
    if losses:
        draw_curve(stage.name, losses, scores, folder / f"{stage.name}.png")
    if stopped:
        raise KeyboardInterrupt
    return done == stage.steps


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, without what a killed one left half-written.

    Raises CheckpointError when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process trains in {shown(folder)}: wait, or stop it") from None
        for half in folder.glob(".*.half"):
            half.unlink()
        yield


@contextmanager
def _stop_at_a_step() -> Iterator[list[int]]:
    """A list that a first SIGINT or SIGTERM puts its number into; a second one acts as usual."""
    stopped: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: object) -> None:
        stopped.append(number)
        for each, handler in usual.items():
            signal.signal(each, handler)

    for number in usual:
        signal.signal(number, note)
    try:
        yield stopped
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state whole or not at all; its SHA-256 stands behind it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    beside = path.with_name(f".{path.name}.half")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.write(hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_state(path: Path) -> dict[str, Any]:
    """The training state in `path`; raises CheckpointError when it is not what was written."""
    content = path.read_bytes()
    content, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointError(f"{path} is damaged: remove it to begin this part again")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {found.get(key)!r}, not {wanted.get(key)!r}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    )
