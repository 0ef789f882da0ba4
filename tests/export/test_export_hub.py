"""A model on the hub: what is asked of it, and what is said when it refuses."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from export_command import assert_one_error
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from export import checkpoint as checkpoint_module
from export.stages import Export
from export.tokenizers_from_checkpoint import write_tokenizers

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}],
    ids=["told to stay offline", "no network"],
)
def test_a_hub_id_out_of_reach_is_refused_at_once(environment, tmp_path):
    """Without a network the command says so within seconds: it does not try again and again."""
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "export", "onnx", "--model", "nobody/no-such-model", "--build", tmp_path],
        cwd=ROOT,
        env=os.environ | environment | {"HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert_one_error(ended.returncode, ended.stderr, "nobody/no-such-model", "check the network")
    assert time.monotonic() - started < 20  # 0.5 s where the machine is idle
    assert not list(tmp_path.glob("*/onnx"))


RESPONSE = SimpleNamespace(headers={}, request=None)  # as much of it as the errors read


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("403\nCannot access gated repo", response=RESPONSE), "accept its licence"),
        (RepositoryNotFoundError("404\nNot found", response=RESPONSE), "the hub has no a/b"),
        (HFValidationError("Repo id must use alphanumeric chars"), "the hub has no a/b"),
        (HfHubHTTPError("500 Server Error\nmore", response=RESPONSE), "(500 Server Error)"),
        (LocalEntryNotFoundError("not in the cache"), "check the network"),
        (OSError("No space left on device"), "(No space left on device)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_refuses_is_said_with_the_way_out(error, words, run_export, monkeypatch, tmp_path):
    """A gated, a missing and an unreachable model need different things of the user."""

    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(checkpoint_module, "snapshot_download", refuse)
    status, stderr = run_export("onnx", "--model", "a/b", "--build", tmp_path)
    assert_one_error(status, stderr, "a/b", words)


def test_the_hub_is_asked_only_for_files_that_are_read(miniature, monkeypatch, tmp_path):
    """Single-file checkpoints and FP16 variants lie in the real repositories: twice the bytes."""
    from huggingface_hub.utils import filter_repo_objects

    from miniature.decoys import DECOYS, FP16_INDEX

    def download(model: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        paths = [str(path.relative_to(miniature)) for path in miniature.rglob("*") if path.is_file()]
        wanted = set(
            filter_repo_objects(paths, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
        assert not wanted & {*DECOYS, FP16_INDEX}
        for path in wanted:
            (tmp_path / "cached" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(miniature / path, tmp_path / "cached" / path)
        return str(tmp_path / "cached")

    monkeypatch.setattr(checkpoint_module, "snapshot_download", download)
    export = Export("someone/tiny", tmp_path)  # finds every part, and its weights whole
    assert export.layout.root == tmp_path / "tiny"
    write_tokenizers(export.family, export.checkpoint, tmp_path)
