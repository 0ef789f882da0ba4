"""Timing caches on disk: whole, together, and no reason for a build to fail."""

import multiprocessing
import re
from pathlib import Path

import pytest

from engines.tensorrt.timing_cache import TimingCache


class Timings:
    """A cache whose content is a set of lines; TensorRT refuses what does not begin with a line `timings`."""

    def __init__(self, kept: bytes) -> None:
        self.lines = set(kept.splitlines()) - {b"timings"}

    def combine(self, other: "Timings", ignore_mismatch: bool) -> bool:
        self.lines |= other.lines
        return True

    def serialize(self) -> bytes:
        return b"\n".join([b"timings", *sorted(self.lines)])


class Config:
    def __init__(self, other_device: bool = False) -> None:
        self.timings: Timings | None = None
        self.other_device = other_device

    def create_timing_cache(self, kept: bytes) -> Timings | None:
        return Timings(kept) if not kept or kept.startswith(b"timings") else None

    def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> bool:
        if self.other_device and cache.lines:
            return False
        self.timings = cache
        return True

    def get_timing_cache(self) -> Timings | None:
        return self.timings


def built(folder: Path, *lines: bytes, other_device: bool = False) -> bool:
    """A build that times kernels of its own; whether TensorRT took what was kept."""
    cache, config = TimingCache(folder, "NVIDIA L4", "11.4.0.106"), Config(other_device)
    taken = cache.load(config)
    assert config.timings is not None
    config.timings.lines |= set(lines)
    cache.save(config)
    return taken


def kept(folder: Path) -> list[bytes]:
    assert [path.name for path in folder.iterdir()] == ["nvidia-l4-11.4.0.106.cache"]
    return (folder / "nvidia-l4-11.4.0.106.cache").read_bytes().splitlines()


def test_timings_add_up_from_build_to_build(tmp_path: Path) -> None:
    assert built(tmp_path, b"a") and built(tmp_path, b"b")
    assert kept(tmp_path) == [b"timings", b"a", b"b"]


@pytest.mark.parametrize("other_device", [False, True])
def test_a_cache_that_tensorrt_refuses_is_replaced_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other_device: bool
) -> None:
    file = tmp_path / "nvidia-l4-11.4.0.106.cache"
    file.write_bytes(b"timings\nstranger" if other_device else b"half a fi")
    assert not built(tmp_path, b"a", other_device=other_device)
    assert kept(tmp_path) == [b"timings", b"a"]
    assert re.search(f"warning: TensorRT refused the timing cache {file}", capsys.readouterr().err)


def test_builds_at_the_same_time_keep_the_timings_of_all(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        names = [f"kernel-{number}".encode() for number in range(24)]
        assert all(pool.starmap(built, [(tmp_path, name) for name in names]))
    assert kept(tmp_path) == [b"timings", *sorted(names)]


def test_a_cache_that_cannot_be_kept_is_no_reason_to_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tmp_path, b"a")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    built(tmp_path, b"b")
    assert "was not kept: [Errno 28] No space left on device" in capsys.readouterr().err
    assert kept(tmp_path) == [b"timings", b"a"]
