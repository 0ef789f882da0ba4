"""The calibration prompts, how many of them run, and what their trajectories leave behind."""

import shutil
import unicodedata
from pathlib import Path
from statistics import median

import numpy as np
import pytest

import export.quiet  # noqa: F401  isort: skip
import torch

from export.calibration import CALIBRATION_FILE, Calibration, read_calibration, write_calibration
from export.checkpoint import linears
from export.modules import load_fp32
from export.policy import AttentionPrecision, calibrated_layers, calibration_digest, read_policy
from export.prompts import PROMPTS, CalibrationSettings, calibrated_for, calibration_prompts
from export.remedies import Remedies
from export.stages import Export
from export.trajectories import Denoiser, timesteps
from mmdit.artifact import Layout, read_manifest, sha256
from mmdit.contract import Precision
from mmdit.errors import QuantizationError
from mmdit.family import family_from_checkpoint


def test_there_are_enough_different_prompts():
    """At least 128, none twice, the empty one among them; with a negative prompt and without."""
    pairs = calibration_prompts()
    prompts = [prompt for prompt, _ in pairs]
    assert len(prompts) == len(set(prompts)) >= 128
    assert all(prompt == prompt.strip() for prompt in prompts)
    assert "" in prompts
    negatives = [negative for _, negative in pairs]
    assert all(negative == negative.strip() for negative in negatives)
    assert 20 <= sum(negative == "" for negative in negatives) <= len(pairs) - 20


def test_the_prompts_are_of_several_scripts():
    """Activations of T5 differ with the script: Latin alone would not show it."""
    texts = "".join(prompt for prompt, _ in calibration_prompts())
    scripts = {unicodedata.name(letter, "?").split()[0] for letter in texts if letter.isalpha()}
    assert {"LATIN", "CYRILLIC", "CJK", "ARABIC"} <= scripts
    assert len(scripts) >= 6


def test_the_prompts_are_of_many_lengths_and_ask_for_text_in_pictures():
    """From a few words to more than CLIP's 77 tokens."""
    prompts = [prompt for prompt, _ in calibration_prompts()]
    words = sorted(len(prompt.split()) for prompt in prompts)
    assert words[0] <= 3 and words[-1] >= 77 and 8 <= median(words) <= 40
    assert sum(any(mark in prompt for mark in '"“”«»„') for prompt in prompts) >= 8


def test_the_first_prompts_are_as_mixed_as_all():
    """A short calibration takes the head of the file: it should not be of one kind."""
    scripts = {
        unicodedata.name(letter, "?").split()[0]
        for prompt, _ in calibration_prompts()[:32]
        for letter in prompt
        if letter.isalpha()
    }
    assert len(scripts) >= 3


def test_the_defaults_run_all_that_the_project_promises(miniature):
    """128 prompts or more, whole trajectories with guidance, at the family's size."""
    family = family_from_checkpoint(miniature)
    settings = CalibrationSettings.for_family(family, prompts=None, steps=None, batch=None)
    assert settings.prompts >= 128 and settings.steps >= 4
    assert settings.sizes == ((family.default_size, family.default_size),)
    assert settings.guidance_scale == family.guidance_scale > 1


def test_a_family_without_guidance_is_calibrated_with_it(miniature):
    """Turbo needs no negative prompt by default, but a request may ask for guidance."""
    family = family_from_checkpoint(miniature, variant="large-turbo")
    assert family.guidance_scale <= 1
    assert CalibrationSettings.for_family(family).guidance_scale > 1


def test_more_prompts_than_there_are_is_refused(miniature):
    """Not silently fewer."""
    with pytest.raises(QuantizationError, match=r"1000 .* has \d+"):
        CalibrationSettings.for_family(family_from_checkpoint(miniature), prompts=1000)


@pytest.mark.parametrize("size", [(100, 128), (128, 0), (4096, 128)])
def test_a_size_that_the_model_cannot_have_is_refused(size, miniature):
    """Before anything runs; the message names it."""
    with pytest.raises(QuantizationError, match=f"{size[0]}x{size[1]} cannot be: expected multiples of 16"):
        CalibrationSettings.for_family(family_from_checkpoint(miniature), sizes=(size,))


@pytest.mark.parametrize(("steps", "count"), [(8, 8), (2, 1), (4, 3)])
def test_timesteps_cover_the_whole_range_evenly(steps, count):
    """From 1000 down in every batch; together no gap wider than the batches' common spacing."""
    work = [timesteps(steps, index, count) for index in range(count)]
    for each in work:
        assert each[0] == 1000 and each == sorted(each, reverse=True) and len(set(each)) == steps
    later = sorted(timestep for each in work for timestep in each[1:])
    gaps = np.diff([0, *later, 1000])
    spacing = 1000 / (count * (steps - 1))
    assert gaps[1:-1] == pytest.approx([spacing] * (len(later) - 1))
    assert [gaps[0], gaps[-1]] == pytest.approx([spacing / 2] * 2)


@pytest.fixture(scope="module")
def calibrated(build) -> Calibration:
    return Calibration.model_validate_json((build.calibration / CALIBRATION_FILE).read_text())


def test_a_calibration_has_a_range_for_each_fp8_product(calibrated, miniature):
    """One positive number a layer whose input the policy quantizes."""
    assert sorted(calibrated.amax) == calibrated_layers(read_policy().decide(linears(miniature)))
    assert len(calibrated.amax) == 53
    assert all(0 < amax < 65504 for amax in calibrated.amax.values())


def test_a_calibration_says_what_it_saw(calibrated, calibration, build):
    """Settings, hashes, versions, the timesteps, and as many rows of negative prompts as of prompts."""
    assert calibrated.settings.prompts == calibration["prompts"]
    assert calibrated.checkpoint == read_manifest(build.calibration).checkpoint
    assert calibrated.prompts_sha256 == sha256(PROMPTS)
    assert {"torch", "nvidia-modelopt"} <= calibrated.versions.keys()
    rows = calibration["prompts"] * calibration["steps"]
    assert calibrated.rows["prompts"] == calibrated.rows["negative prompts"] == rows
    assert sum(calibrated.rows["by timestep"].values()) == 2 * rows
    assert len(calibrated.timesteps) == calibration["steps"]


@pytest.fixture
def calibrate(miniature, build):
    """A calibration of two batches into a folder."""
    decisions = read_policy().decide(linears(miniature))
    family = family_from_checkpoint(miniature)
    fp16 = AttentionPrecision.FP16
    fingerprint = read_manifest(build.calibration).checkpoint
    made_for = calibrated_for(fingerprint, calibration_digest(decisions, fp16), family)
    settings = CalibrationSettings.for_family(family, prompts=2, steps=2, batch=1)

    def run(folder: Path) -> Calibration:
        folder.mkdir(exist_ok=True)
        write_calibration(family, miniature, made_for, decisions, fp16, Remedies(), settings, folder)
        return read_calibration(folder / CALIBRATION_FILE, made_for)

    return run


def test_an_interrupted_calibration_goes_on_and_ends_the_same(calibrate, tmp_path, monkeypatch, capsys):
    """Stopped in its second batch, it runs only that one again, and finds the same ranges to the last bit."""
    whole = calibrate(tmp_path / "whole")
    assert "2 batches × 2 steps = 4 calls of the MMDiT, 2 rows each" in capsys.readouterr().out
    run_batch = Denoiser.__call__
    seeds: list[int] = []

    def interrupted(self, batch, *arguments):
        if len(batch.timesteps) > 1:  # not the call that is timed
            seeds.append(batch.seed)
            if len(seeds) == 2:
                raise KeyboardInterrupt
        return run_batch(self, batch, *arguments)

    monkeypatch.setattr(Denoiser, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tmp_path / "resumed")
    assert calibrate(tmp_path / "resumed") == whole
    assert seeds == [0, 1, 1]
    out = capsys.readouterr().out
    assert "goes on after 1 batches" in out and "1 batches × 2 steps = 2 calls" in out
    assert not list(tmp_path.glob(".calibration*"))


def test_a_value_that_is_not_finite_names_the_layer(calibrate, tmp_path, monkeypatch):
    """An amax of infinity would make every scale that follows worthless."""
    layer = "transformer_blocks.2.ff.net.2"

    def overflowing(*arguments: object) -> torch.nn.Module:
        module = load_fp32(*arguments)
        module.model.get_submodule(layer).register_forward_pre_hook(lambda _, given: (given[0] * torch.inf,))
        return module

    monkeypatch.setattr("export.calibration.load_fp32", overflowing)
    with pytest.raises(QuantizationError, match=f"{layer}: the calibration met values that are not finite"):
        calibrate(tmp_path / "calibration")


OTHER = {
    "checkpoint": ("0" * 64, "another checkpoint"),
    "policy": ("1" * 64, "another policy"),
    "prompts_sha256": ("2" * 64, "another set of prompts"),
    "t5_tokens": (77, "another length of T5's input"),
}


@pytest.mark.parametrize("field", OTHER)
def test_a_calibration_of_another_kind_is_refused_with_both_values(field, calibrated, tmp_path):
    """Its ranges may fit by name, and be wrong; the evaluation's prompts may be in another prompt set."""
    path = tmp_path / CALIBRATION_FILE
    path.write_text(calibrated.model_dump_json())
    made_for = {name: getattr(calibrated, name) for name in OTHER}
    read_calibration(path, made_for)
    other, words = OTHER[field]
    with pytest.raises(QuantizationError, match=f"made for {words}") as refused:
        read_calibration(path, made_for | {field: other})
    assert str(other) in str(refused.value) and str(made_for[field]) in str(refused.value)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"amax": 1}'])
def test_a_damaged_calibration_is_refused(text, tmp_path):
    """In one line that names the file."""
    path = tmp_path / CALIBRATION_FILE
    path.write_text(text)
    with pytest.raises(QuantizationError, match=f"{path} is damaged"):
        read_calibration(path, {})


def test_a_saved_calibration_gives_the_same_file_without_a_forward_pass(
    build, calibration, miniature, tmp_path, monkeypatch
):
    """Byte for byte; nothing denoises."""
    copied = Layout(str(miniature), tmp_path)
    for folder in (build.scan, build.onnx("mmdit")):
        shutil.copytree(folder, copied.root / folder.relative_to(build.root))
    monkeypatch.setattr("export.trajectories.Denoiser.__init__", None)
    Export(str(miniature), tmp_path).fp8(calibration=build.calibration / CALIBRATION_FILE)
    for name in ("model.onnx", "audit.json"):
        files = [each.onnx("mmdit", Precision.FP8) / name for each in (build, copied)]
        assert files[0].read_bytes() == files[1].read_bytes()
