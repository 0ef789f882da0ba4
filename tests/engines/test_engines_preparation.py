"""What `make engines` does for a GPU's target on a machine without it: everything up to the build."""

import re
from pathlib import Path

import pytest

from engines.__main__ import main
from mmdit import target
from mmdit.artifact import Layout
from mmdit.contract import Precision
from mmdit.errors import ArtifactError, ContractError, TargetError


@pytest.fixture
def arguments(build: Layout, miniature: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(target, "find_gpu", lambda: None)
    return ["build", "--model", str(miniature), "--build", str(build.root.parent), "--target", "hopper"]


def test_all_is_checked_and_the_command_that_goes_on_is_printed(
    arguments: list[str], build: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """Readiness, profiles, memory; then what is missing. Nothing is left behind."""
    options = ["--strip", "--workspace-gib", "20"]
    with pytest.raises(TargetError, match="'hopper' cannot be built here: .*no NVIDIA GPU was found"):
        main([*arguments, *options])
    printed = capsys.readouterr().out
    for component in ("clip_l", "clip_g", "t5", "mmdit", "vae_decoder"):
        assert re.search(rf"\| {component} +\| \w+ +\| \d+ rules hold in [\d,]+ places +\| \d, run", printed)
    assert "static, for a CUDA graph" in printed
    assert re.search(r"\| H100 80 GB \| H200 \|\n.*\n\| yes +\| yes +\|", printed)
    commands = re.findall(r"\.venv/bin/python -m engines (build .*)", printed)
    assert commands == 2 * [  # on a machine with the GPU, and in the container
        f"build --model {build.name} --target hopper --precision fp8 --shapes any-64-256 "
        "--workspace-gib 20 --strip"
    ]
    assert not (build.root / "engines" / "hopper").exists()


def test_a_shape_set_that_the_model_cannot_serve_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ContractError, match="'buckets-1mp' goes up to 1536 pixels.*covers 512"):
        main([*arguments, "--shapes", "buckets-1mp"])


def test_a_file_that_was_edited_is_refused_before_anything_is_built(
    arguments: list[str], build: Layout
) -> None:
    file = build.onnx("mmdit", Precision.FP8) / "model.onnx"
    before = file.read_bytes()
    try:
        file.write_bytes(before + b"\0")
        with pytest.raises(ArtifactError, match="model.onnx.*changed.*make fp8"):
            main(arguments)
    finally:
        file.write_bytes(before)


def test_a_target_is_refused_early_where_more_than_its_preparation_is_wanted(arguments: list[str]) -> None:
    """`make repository` asks so before hours of export; `make engines` does not."""
    main([*arguments, "--check", "known"])
    with pytest.raises(TargetError, match="`make engines TARGET=hopper` does everything up to the build"):
        main([*arguments, "--check", "here"])
