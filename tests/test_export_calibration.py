"""The calibration prompts, how many of them run, and what their trajectories leave behind."""

import json
import unicodedata
from statistics import median

import pytest

from export.calibration import CALIBRATION_FILE, read_ranges
from export.policy import LayerPrecision, rule_for
from export.prompts import CalibrationSettings, calibration_prompts
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
    assert settings.size == family.default_size
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


def test_a_calibration_has_a_range_for_each_fp8_product_and_says_what_it_saw(build):
    """One positive number a layer, over all the steps of a trajectory."""
    content = json.loads((build.calibration / CALIBRATION_FILE).read_text())
    ranges = read_ranges(build.calibration)
    assert len(ranges) == 53
    assert all(rule_for(layer).precision is LayerPrecision.FP8 for layer in ranges)
    assert all(0 < amax < 65504 for amax in ranges.values())
    timesteps = content["timesteps"]
    assert len(timesteps) == content["settings"]["steps"] == 4
    assert timesteps == sorted(timesteps, reverse=True) and timesteps[0] == 1000


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        ("transformer_blocks.0.attn.to_q", LayerPrecision.FP8),
        ("transformer_blocks.37.attn2.to_out.0", LayerPrecision.FP8),
        ("transformer_blocks.5.attn.to_add_out", LayerPrecision.FP8),
        ("transformer_blocks.12.ff_context.net.0.proj", LayerPrecision.FP8),
        ("transformer_blocks.12.ff.net.2", LayerPrecision.FP8),
        ("transformer_blocks.23.norm1.linear", LayerPrecision.FP8_WEIGHTS),
        ("transformer_blocks.23.norm1_context.linear", LayerPrecision.FP8_WEIGHTS),
        ("norm_out.linear", LayerPrecision.FP16),
        ("context_embedder", LayerPrecision.FP16),
        ("time_text_embed.text_embedder.linear_1", LayerPrecision.FP16),
        ("proj_out", LayerPrecision.FP16),
    ],
)
def test_the_policy_goes_by_a_layers_role(layer, precision):
    """Whatever the number of its block; and each has a reason."""
    rule = rule_for(layer)
    assert rule.precision is precision
    assert rule.reason
