"""Artifacts: whole or not at all, and remade exactly when what they were made from has changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmdit import artifact
from mmdit.artifact import (
    MANIFEST,
    Layout,
    Manifest,
    digest,
    fingerprint,
    read_manifest,
    require,
    sha256,
    versions,
    whole,
)
from mmdit.contract import Precision
from mmdit.errors import ArtifactError


@pytest.fixture(autouse=True)
def _own_hashes(tmp_path, monkeypatch):
    """Remember hashes in the test's folder, not in the checkout's."""
    monkeypatch.setattr(artifact, "_HASHES", tmp_path / "remembered" / ".sha256.json")


def manifest(**changes: object) -> Manifest:
    values = {
        "kind": "onnx",
        "checkpoint": "f" * 64,
        "made_from": {"vae/config.json": "a" * 64},
        "settings": {"opset": 20},
        "versions": {"torch": "2.13.0"},
    }
    return Manifest.model_validate(values | changes)


@pytest.fixture
def made(tmp_path) -> Path:
    folder = tmp_path / "build" / "thing"
    with whole(folder, manifest()) as partial:
        (partial / "model.onnx").write_bytes(b"first")
        (partial / "deeper").mkdir()
        (partial / "deeper/weights").write_bytes(b"weights")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_an_artifact_lists_its_files(made):
    """Each with its hash, those in folders too; and nothing else lies beside it."""
    assert names(made) == ["deeper", "deeper/weights", MANIFEST, "model.onnx"]
    assert read_manifest(made).files == {
        "deeper/weights": sha256(made / "deeper/weights"),
        "model.onnx": sha256(made / "model.onnx"),
    }
    assert [path.name for path in made.parent.iterdir()] == ["thing"]


def test_nothing_has_its_final_name_before_it_is_whole(tmp_path):
    """A reader finds the old artifact or none until the block ends."""
    folder = tmp_path / "thing"
    with whole(folder, manifest()) as partial:
        (partial / "file").write_text("half")
        assert not folder.exists()
        assert partial.parent == folder.parent  # so that it can be renamed
    assert folder.is_dir()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(error, tmp_path):
    """Neither under the final name nor beside it."""
    with pytest.raises(error), whole(tmp_path / "thing", manifest()) as partial:
        (partial / "file").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_an_error_keeps_what_was_there(made):
    """The old artifact stays whole."""
    with pytest.raises(ValueError), whole(made, manifest()) as partial:
        (partial / "model.onnx").write_bytes(b"second")
        raise ValueError
    assert manifest().reason_to_rebuild(made) is None
    assert (made / "model.onnx").read_bytes() == b"first"
    assert [path.name for path in made.parent.iterdir()] == ["thing"]


def test_a_new_artifact_replaces_the_old_one_as_a_whole(made):
    """No file of the old one stays among the new."""
    with whole(made, manifest(settings={"opset": 21})) as partial:
        (partial / "other.onnx").write_bytes(b"second")
    assert names(made) == [MANIFEST, "other.onnx"]
    assert [path.name for path in made.parent.iterdir()] == ["thing"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    """Its half-written folder goes; that of a process that still works stays."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, replaced = tmp_path / f".thing.{ended.pid}.partial", tmp_path / f".thing.old.{ended.pid}.partial"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as working:
        alive = tmp_path / f".thing.{working.pid}.partial"
        for folder in (dead, replaced, alive):
            folder.mkdir()
            (folder / "half").write_text("")
        with whole(tmp_path / "thing", manifest()):
            pass
        working.kill()
    assert {path.name for path in tmp_path.iterdir()} - {"remembered"} == {"thing", alive.name}


def test_an_unchanged_artifact_is_kept(made):
    """Findings are results: they are no reason to make it again."""
    assert manifest().reason_to_rebuild(made) is None
    assert manifest(findings={"error": 0.1}).reason_to_rebuild(made) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "engine"}, "kind differs: onnx → engine"),
        ({"checkpoint": "0" * 64}, "checkpoint differs: ffffffffffff… → 000000000000…"),
        (
            {"made_from": {"vae/config.json": "b" * 64}},
            "made_from differ: vae/config.json aaaaaaaaaaaa… → bbbbbbbbbbbb…",
        ),
        ({"settings": {"opset": 21}}, "settings differ: opset 20 → 21"),
        ({"settings": {"opset": 20, "size": 128}}, "settings differ: size none → 128"),
        ({"settings": {}}, "settings differ: opset 20 → none"),
        ({"versions": {"torch": "2.14.0"}}, "versions differ: torch 2.13.0 → 2.14.0"),
    ],
)
def test_the_reason_to_rebuild_names_what_changed(changes, reason, made):
    """The old value and the new."""
    assert manifest(**changes).reason_to_rebuild(made) == reason


def test_a_changed_file_is_a_reason_to_rebuild(made):
    """Its name is said, whatever its size and however deep it lies."""
    (made / "model.onnx").write_bytes(b"FIRST")
    os.utime(made / "model.onnx", ns=(0, 1))  # the clock of a file system may tick slowly
    (made / "deeper/weights").write_bytes(b"")
    assert manifest().reason_to_rebuild(made) == "deeper/weights, model.onnx changed on disk"


def test_a_missing_file_or_manifest_is_a_reason_to_rebuild(made):
    """Told apart: nothing was made, something was damaged."""
    assert manifest().reason_to_rebuild(made.parent / "other") == "new"
    (made / "model.onnx").unlink()
    assert manifest().reason_to_rebuild(made) == "a file of it is gone"
    (made / MANIFEST).write_text('{"kind": "onnx"}')
    reason = manifest().reason_to_rebuild(made)
    assert reason is not None and reason.startswith(f"{made / MANIFEST} cannot be read")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": 3}', "\udcff"])
def test_a_damaged_manifest_is_an_artifact_error(text, made):
    """Never another exception, whatever lies in the file."""
    (made / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_manifest(made)


def test_a_stage_names_the_command_that_makes_what_it_needs(made):
    """In the user's words."""
    assert require(made, "make onnx").kind == "onnx"
    with pytest.raises(ArtifactError, match=r"other is not there yet: run `make onnx` first"):
        require(made.parent / "other", "make onnx")


def test_a_folder_that_cannot_be_made_is_an_artifact_error(tmp_path):
    """A file lies in the way."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be made"), whole(tmp_path / "file" / "thing", manifest()):
        pass


def test_hashes_are_remembered_while_a_file_stays_the_same(tmp_path, monkeypatch):
    """Gigabytes are read once; renaming is no change, writing is."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = sha256(path)
    read: list[Path] = []
    monkeypatch.setattr(artifact, "_hash", lambda path: read.append(path) or "read again")
    moved = path.rename(tmp_path / "moved")
    assert sha256(moved) == first
    assert not read
    moved.write_bytes(b"two")
    os.utime(moved, ns=(0, 1))
    assert sha256(moved) == "read again"


def test_a_damaged_or_unwritable_memory_of_hashes_does_no_harm(tmp_path, monkeypatch):
    """The files are read again."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    expected = sha256(path)
    (tmp_path / "remembered/.sha256.json").write_text("{")
    assert sha256(path) == expected
    monkeypatch.setattr(artifact, "_HASHES", path / "not a folder" / "hashes")
    assert sha256(path) == expected


def test_the_memory_of_hashes_is_bounded(tmp_path, monkeypatch):
    """Old builds are forgotten."""
    monkeypatch.setattr(artifact, "_HASHES_KEPT", 3)
    for number in range(5):
        (tmp_path / str(number)).write_text(str(number))
        sha256(tmp_path / str(number))
    assert len(json.loads((tmp_path / "remembered/.sha256.json").read_text())) == 3


def test_a_fingerprint_names_files_below_the_root(tmp_path):
    """So that two copies of a checkpoint have the same."""
    copies = []
    for copy in ("a", "b"):
        (tmp_path / copy / "vae").mkdir(parents=True)
        (tmp_path / copy / "vae/config.json").write_text("{}")
        (tmp_path / copy / "model_index.json").write_text("{}")
        paths = [tmp_path / copy / "vae/config.json", tmp_path / copy / "model_index.json"]
        copies.append(fingerprint(paths, tmp_path / copy))
    assert copies[0] == copies[1]
    assert list(copies[0]) == ["model_index.json", "vae/config.json"]


def test_a_digest_is_of_the_content_not_of_its_order():
    """Dictionaries are equal however they were filled."""
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_versions_are_those_installed():
    """A tool that is not there is an error, not an empty entry."""
    import numpy

    assert versions("numpy") == {"numpy": numpy.__version__}
    with pytest.raises(ImportError):
        versions("no-such-tool-at-all")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("miniature", "miniature"),
        ("stabilityai/stable-diffusion-3.5-large", "stable-diffusion-3.5-large"),
        ("{folder}", "mine"),
        ("{folder}/", "mine"),
        ("{folder}/../mine", "mine"),
    ],
)
def test_a_model_is_named_by_the_last_part_of_its_path(model, name, tmp_path):
    """A folder, a hub id or the miniature."""
    (tmp_path / "mine").mkdir()
    layout = Layout(model.format(folder=tmp_path / "mine"), tmp_path / "build")
    assert (layout.name, layout.root) == (name, tmp_path / "build" / name)


def test_artifacts_lie_apart():
    """By stage, component, target and precision."""
    layout = Layout("miniature", Path("build"))
    precisions = (Precision.FP16, Precision.FP8)
    folders = [
        *(layout.onnx("mmdit", precision) for precision in precisions),
        *(layout.engine(target, "mmdit", p) for target in ("cpu", "hopper") for p in precisions),
        *(layout.repository(target, p) for target in ("cpu", "hopper") for p in precisions),
        layout.tokenizers,
        layout.preview,
        layout.calibration,
    ]
    assert len(set(folders)) == len(folders)
    assert all(folder.is_relative_to("build/miniature") for folder in folders)
    assert layout.onnx("mmdit", Precision.FP8) == Path("build/miniature/onnx-fp8/mmdit")


@pytest.mark.parametrize("model", ["org/name", "org/name/", "/no/such/folder/name"])
def test_the_last_part_of_a_models_path_names_its_folder(tmp_path, model):
    """With or without a slash at the end."""
    assert Layout(model, tmp_path).root == tmp_path / "name"


@pytest.mark.parametrize("model", ["", "/", "org/.."])
def test_a_model_without_a_name_is_refused(tmp_path, model):
    """Its artifacts would lie in `build/` itself."""
    with pytest.raises(ArtifactError, match="names no model"):
        Layout(model, tmp_path)


def test_processes_that_make_the_same_artifact_take_turns(tmp_path):
    """Both end well, and the artifact is whole."""
    code = (
        "import sys, time; from pathlib import Path; from mmdit.artifact import Manifest, whole\n"
        "manifest = Manifest(kind='x', checkpoint='x', made_from={}, settings={}, versions={})\n"
        "with whole(Path(sys.argv[1]), manifest) as folder:\n"
        "    (folder / 'a').write_text('a'); time.sleep(0.3); (folder / 'b').write_text('b')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "thing")]
    root = Path(artifact.__file__).parent.parent
    processes = [subprocess.Popen(command, cwd=root) for _ in range(3)]
    assert [process.wait(30) for process in processes] == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "thing").iterdir()) == ["a", "b", "manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
