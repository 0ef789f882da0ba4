"""The packager asks the quality gate: refused when it was never run, failed, or is about other engines."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stand_in_plans import write_engines
from written_gate import write_gate

from mmdit.artifact import Layout, read_manifest
from mmdit.contract import Precision
from mmdit.errors import RepositoryError
from mmdit.family import family_from_checkpoint
from mmdit.shapes import shape_set
from serve.engine_set import Engines
from serve.repository import package

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hopper(miniature, tmp_path) -> Layout:
    """The miniature's engines for Hopper, no gate yet."""
    layout = Layout("miniature", tmp_path)
    family = family_from_checkpoint(miniature)
    write_engines(layout, family, shape_set(family))
    return layout


def packaged(layout: Layout, *, accept: bool = False) -> dict[str, Any]:
    """What the manifest of the FP8 repository says about quality."""
    output = layout.repository("hopper", Precision.FP8)
    package([Engines(layout, "hopper", Precision.FP8)], output, accept_quality=accept)
    return read_manifest(output).settings["quality"]["hopper"]


WAYS_OUT = r"`make gate MODEL=miniature TARGET=hopper`, serve PRECISION=fp16, .*--accept-quality"


def test_fp8_engines_that_were_never_judged_are_refused(hopper):
    """The message names the command that judges them and the way around it; nothing is written."""
    with pytest.raises(RepositoryError, match="their quality gate was never run. Run " + WAYS_OUT):
        packaged(hopper)
    assert not hopper.repository("hopper", Precision.FP8).exists()


def test_fp8_engines_that_failed_are_refused_with_the_figure_that_failed(hopper):
    write_gate(hopper, passed=False)
    with pytest.raises(RepositoryError, match="failed: SSIM, mean is 0.91, expected at least 0.97. Run"):
        packaged(hopper)
    assert not hopper.repository("hopper", Precision.FP8).exists()


@pytest.mark.parametrize(
    "file", ["mmdit-fp8/model.plan", "t5-fp16/model.plan", "vae_decoder-fp16/model.plan"]
)
def test_a_gate_about_other_engines_does_not_count(hopper, file):
    """Any engine that makes the picture: the file that differs is named."""
    write_gate(hopper, **{file: "0" * 64})
    with pytest.raises(RepositoryError, match=rf"was run on other files \({file}\)"):
        packaged(hopper)


def test_a_gate_of_another_target_does_not_count(hopper):
    """An engine for Ada has other kernels."""
    write_gate(hopper)
    hopper.quality("hopper").rename(hopper.quality("ada"))
    with pytest.raises(RepositoryError, match="never run"):
        packaged(hopper)


def test_a_passed_gates_figures_travel_with_the_repository(hopper):
    """So that whoever serves it can see what it costs, without the build folder."""
    write_gate(hopper)
    quality = packaged(hopper)
    assert quality["verdict"] == "passed" and quality["profile"] == "miniature"
    assert quality["figures"]["ssim_mean"] == {"fp8": 0.991, "floor": 0.999}
    assert quality["mission"]["met"]


def test_accepted_by_name_engines_are_packaged_and_the_manifest_says_why_they_should_not_be(hopper):
    """Never run, failed, other engines; accepting does not hide a passed gate."""
    assert packaged(hopper, accept=True) == {
        "verdict": "accepted",
        "reason": "their quality gate was never run",
    }
    write_gate(hopper, passed=False)
    assert "failed: SSIM, mean is 0.91" in packaged(hopper, accept=True)["reason"]
    write_gate(hopper, **{"mmdit-fp8/model.plan": "0" * 64})
    assert "other files" in packaged(hopper, accept=True)["reason"]
    write_gate(hopper)
    assert packaged(hopper, accept=True)["verdict"] == "passed"


def test_an_accepted_repository_is_written_again_once_the_gate_is_passed(hopper):
    """What the manifest says about quality is part of what the repository is."""
    output = hopper.repository("hopper", Precision.FP8)
    packaged(hopper, accept=True)
    write_gate(hopper)
    engines = [Engines(hopper, "hopper", Precision.FP8)]
    assert "quality" in str(package(engines, output))
    assert package(engines, output) is None


def test_fp16_needs_no_gate(hopper, miniature):
    """It is what FP8 is measured by."""
    family = family_from_checkpoint(miniature)
    write_engines(hopper, family, shape_set(family), precision=Precision.FP16, only=["mmdit"])
    output = hopper.repository("hopper", Precision.FP16)
    package([Engines(hopper, "hopper", Precision.FP16)], output)
    assert not read_manifest(output).settings["quality"]


def test_the_command_refuses_with_status_2_and_accepts_by_name_with_a_warning(hopper):
    command = [sys.executable, "-m", "serve", "package", "--target", "hopper", "--build"]
    command.append(str(hopper.root.parent))
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "error: the FP8 engines of miniature for hopper are not to be served" in refused.stderr
    accepted = subprocess.run([*command, "--accept-quality"], cwd=ROOT, capture_output=True, text=True)
    assert accepted.returncode == 0, accepted.stderr
    assert accepted.stderr == "warning: FP8 for hopper accepted although their quality gate was never run\n"


def test_the_packager_does_not_import_the_gate():
    """It reads the gate's manifest: the machine that packages needs no torch."""
    for path in (ROOT / "serve").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] == "quality"], path
