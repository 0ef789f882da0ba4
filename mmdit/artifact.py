"""Artifacts and their manifests: where a stage's files lie, what they were made from, when to remake them.

An artifact is a folder with a `manifest.json`. It appears under its name only when it is whole: a stage
writes into a sibling folder and renames it. A stage reuses an artifact when its manifest says that it
was made from the same files, with the same settings and tools; otherwise it says why it rebuilds.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mmdit.contract import Precision
from mmdit.errors import ArtifactError, first_line
from mmdit.progress import Progress

MANIFEST = "manifest.json"
BUILD = Path(__file__).resolve().parent.parent / "build"
MEASUREMENTS = BUILD.parent / "docs" / "measurements"
_HASHES = BUILD / ".sha256.json"
_HASHES_KEPT = 4096
_CHUNK = 1 << 22


class Manifest(BaseModel):
    """What lies beside an artifact.

    `made_from` names inputs and their SHA-256; `files` the artifact's own; `code` the code that made it
    (`mmdit.code.code_of`); `checkpoint` is the fingerprint of the whole checkpoint, equal in all artifacts
    that belong together; `findings` what the stage measured or decided, which is no reason to rebuild.
    """

    model_config = ConfigDict(extra="forbid")

    kind: str
    checkpoint: str
    made_from: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]
    code: dict[str, str] = {}
    files: dict[str, str] = {}
    findings: dict[str, Any] = {}

    def reason_to_rebuild(self, folder: Path) -> str | None:
        """Why the artifact in `folder` is not the one that this manifest describes; None if it is."""
        if not folder.exists():
            return "new"
        try:
            found = read_manifest(folder)
        except ArtifactError as error:
            return str(error)
        for field in ("kind", "checkpoint", "made_from", "settings", "code", "versions"):
            old, new = getattr(found, field), getattr(self, field)
            if old != new:
                if field == "code":
                    changed = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
                    return f"code changed: {_names(changed)}"
                if isinstance(old, dict) and isinstance(new, dict):
                    keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
                    return f"{field} differ: " + ", ".join(
                        f"{key} {_short(old.get(key))} → {_short(new.get(key))}" for key in keys
                    )
                return f"{field} differs: {_short(old)} → {_short(new)}"
        with contextlib.suppress(FileNotFoundError):
            damaged = [name for name, digest in found.files.items() if sha256(folder / name) != digest]
            return f"{', '.join(damaged)} changed on disk" if damaged else None
        return "a file of it is gone"


class Layout:
    """The folders of one model's artifacts below `build/`.

    `model` is "miniature", a checkpoint's folder or a hub id; the last part of its path names the model.
    """

    def __init__(self, model: str, build: Path = BUILD) -> None:
        self.model = model
        self.name = Path(model).resolve().name if Path(model).is_dir() else Path(model).name
        if not model or self.name in ("", ".."):
            raise ArtifactError(f"MODEL={model!r} names no model: expected miniature, a folder or a hub id")
        self.root = build / self.name

    def onnx(self, component: str, precision: Precision = Precision.FP16) -> Path:
        """The folder of a component's ONNX file."""
        stage = "onnx" if precision is Precision.FP16 else f"onnx-{precision.value}"
        return self.root / stage / component

    @property
    def tokenizers(self) -> Path:
        """The folder of the three tokenizers, with padding and truncation set."""
        return self.root / "onnx" / "tokenizers"

    @property
    def preview(self) -> Path:
        """The folder of the matrix that turns latents into the colours of a preview."""
        return self.root / "onnx" / "preview"

    @property
    def scan(self) -> Path:
        """The folder of the activations' magnitudes, and of the remedies that they call for."""
        return self.root / "scan"

    @property
    def sensitivity(self) -> Path:
        """The folder of the groups of layers, ranked by what FP8 does to them."""
        return self.root / "sensitivity"

    @property
    def calibration(self) -> Path:
        """The folder of the quantizers' measured ranges."""
        return self.root / "calibration"

    def engine(self, target: str, component: str, precision: Precision) -> Path:
        """The folder of a component's engine; FP16 and FP8 lie side by side."""
        return self.root / "engines" / target / f"{component}-{precision.value}"

    def quality(self, target: str) -> Path:
        """The quality gate of a target's FP8 engines: figures, verdict and pictures."""
        return self.root / "quality" / target

    @property
    def report(self) -> Path:
        """The folder of the page that tells what FP8 cost."""
        return self.root / "report"

    def repository(self, target: str, precision: Precision) -> Path:
        """The Triton model repository for a target."""
        return self.root / "repository" / f"{target}-{precision.value}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`; raises ArtifactError when there is none, or none that can be read."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{shown(folder)} is not there yet") from None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise ArtifactError(f"{shown(folder / MANIFEST)} cannot be read: {first_line(error)}") from None


def shown(path: Path) -> str:
    """A path as a person at this prompt would type it."""
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def require(folder: Path, made_by: str) -> Manifest:
    """The manifest of an artifact that an earlier stage must have made.

    Raises ArtifactError, naming the command that makes it.
    """
    try:
        return read_manifest(folder)
    except ArtifactError as error:
        raise ArtifactError(f"{error}: run `{made_by}` first") from None


@contextlib.contextmanager
def whole(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Write an artifact whole or not at all.

    Yields a sibling folder to write into. At the end of the block its files are hashed into the
    manifest, and it takes the final name; after an error nothing is left.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be made ({error}): choose another --build") from None
    for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
        if not _alive(int(leftover.name.split(".")[-2])):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    lock = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that make artifacts of one folder take turns
        yield partial
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest.files = {str(path.relative_to(partial)): sha256(path) for path in paths}
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            old = folder.parent / f".{folder.name}.old.{os.getpid()}.partial"
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, remembered in `build/` while the file's size and time stay the same."""
    return _hashes([path])[path]


def fingerprint(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """The SHA-256 of each file by its path below `root`, with progress while gigabytes are read."""
    return {str(path.relative_to(root)): value for path, value in _hashes(sorted(paths)).items()}


def digest(content: Any) -> str:
    """The SHA-256 of something that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def versions(*names: str) -> dict[str, str]:
    """The installed versions of the tools that make an artifact."""
    return {name: metadata.version(name) for name in names}


def _hashes(paths: list[Path]) -> dict[Path, str]:
    try:
        known: dict[str, str] = json.loads(_HASHES.read_text())
    except (OSError, ValueError):
        known = {}
    states = {path: _state(path) for path in paths}
    unknown = [path for path, state in states.items() if state not in known]
    megabytes = {path: path.stat().st_size >> 20 for path in unknown}
    total = sum(megabytes.values())
    with Progress("hashing", total, "MB") if total > 512 else contextlib.nullcontext() as progress:
        for path in unknown:
            known[states[path]] = _hash(path)
            if progress:
                progress.advance(megabytes[path])
    if unknown:
        newest = dict(list(known.items())[-_HASHES_KEPT:])
        partial = _HASHES.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):  # a checkout that cannot be written hashes anew each time
            _HASHES.parent.mkdir(exist_ok=True)
            partial.write_text(json.dumps(newest))
            partial.rename(_HASHES)
    return {path: known[state] for path, state in states.items()}


def _hash(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            hashed.update(chunk)
    return hashed.hexdigest()


def _state(path: Path) -> str:
    """What changes when a file's content does, and does not when it is renamed."""
    status = path.stat()
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _names(names: Iterable[str]) -> str:
    """The first three of some names, and how many more there are."""
    first = sorted(names)
    more = f" and {len(first) - 3} more" if len(first) > 3 else ""
    return ", ".join(first[:3]) + more


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"
