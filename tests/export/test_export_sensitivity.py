"""The sensitivity study: one group of layers in FP8 at a time, damage beside gain; a budget's policy."""

import json
import shutil
import struct

import pytest

import export.quiet  # noqa: F401  isort: skip
import torch
from safetensors.torch import load_file, save_file

from export import sensitivity
from export.budget import propose
from export.calibration import CALIBRATION_FILE
from export.candidates import candidate_rules
from export.checkpoint import MINIATURE, linears
from export.comparison import Comparison, Damage
from export.fp8_from_calibration import quantized_module
from export.groups import ADALN_WEIGHTS, Group, fp8_shares, layer_groups, quantized
from export.modules import load_module
from export.policy import AttentionPrecision, LayerPrecision, calibrated_layers, read_policy
from export.prompts import CalibrationSettings
from export.remedies import Remedies
from export.sensitivity import CHART_FILE, KEPT, POLICY_FILE, SENSITIVITY_FILE, study
from export.switches import Switches
from mmdit.errors import QuantizationError
from mmdit.family import family_from_checkpoint

pytestmark = pytest.mark.slow

DAMAGED = "transformer_blocks.3.ff.net"  # of the block that hurts most
FP8, FP16 = AttentionPrecision.FP8, AttentionPrecision.FP16


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The miniature with a feed-forward that E4M3 cannot hold.

    One weight is 6e4, so that with one scale for the tensor all others become zero. What it multiplies is
    zero, so the model without quantizers is as before but for that hidden channel.
    """
    folder = tmp_path_factory.mktemp("damaged") / "miniature"
    shutil.copytree(MINIATURE, folder)
    for shard in (folder / "transformer").glob("*.safetensors"):
        tensors = load_file(shard)
        if f"{DAMAGED}.2.weight" in tensors:
            tensors[f"{DAMAGED}.2.weight"][0, 0] = 6e4
        if f"{DAMAGED}.0.proj.weight" in tensors:
            tensors[f"{DAMAGED}.0.proj.weight"][0] = 0
        if f"{DAMAGED}.0.proj.bias" in tensors:
            tensors[f"{DAMAGED}.0.proj.bias"][0] = -100  # GELU makes it zero
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def family(miniature):
    """With a short context: a third of the work."""
    return family_from_checkpoint(miniature, name="miniature", t5_tokens=16)


@pytest.fixture(scope="module")
def decisions(miniature):
    return read_policy().decide(linears(miniature))


@pytest.fixture(scope="module")
def run(damaged, family, decisions):
    """A short study of the damaged miniature, into a folder."""

    def run(folder, **given):
        settings = CalibrationSettings.for_family(family, prompts=2, steps=2, batch=2)
        folder.mkdir(exist_ok=True)
        prompts = [("a large red circle on the left, white background", "")]
        chosen = {"prompts": prompts, "steps": 2, **given}
        return study(family, damaged, "checkpoint", decisions, FP16, Remedies(), settings, folder, **chosen)

    return run


@pytest.fixture(scope="module")
def studied(run, tmp_path_factory):
    """The folder of a study by role with a budget that not everything in FP8 reaches."""
    folder = tmp_path_factory.mktemp("build") / "sensitivity"
    run(folder, budget=0.9)
    return folder


@pytest.fixture(scope="module")
def result(studied):
    return json.loads((studied / SENSITIVITY_FILE).read_text())


@pytest.fixture(scope="module")
def ranges(studied):
    return json.loads((studied.parent / KEPT / "calibration" / CALIBRATION_FILE).read_text())["amax"]


@pytest.fixture(scope="module")
def switches(miniature, decisions, ranges):
    module = load_module("mmdit", miniature, torch.float32)
    return Switches(module.model, candidate_rules(decisions), ranges)


@pytest.fixture(scope="module")
def inputs(family):
    """One row of noise at the default size."""
    torch.manual_seed(0)
    side = family.default_size // 8
    return {
        "hidden_states": torch.randn(1, family.latent_channels, side, side),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, family.context_tokens, family.context_dim),
        "pooled_projections": torch.randn(1, family.pooled_dim),
    }


def test_a_group_that_was_damaged_on_purpose_ranks_first(result):
    """Worst first; the group's velocity is wrong with and without a prompt, at every timestep."""
    errors = [group["damage"]["velocity_error"] for group in result["groups"]]
    assert errors == sorted(errors, reverse=True)
    worst = result["groups"][0]
    assert worst["name"] == "feed-forward out" and errors[0] > 2 * errors[1]
    assert len(worst["damage"]["by_timestep"]) == len(result["timesteps"]) == 2
    for rows in worst["damage"]["by_timestep"].values():
        assert rows.keys() == {"prompt", "negative prompt"} and min(rows.values()) > 0.01


def test_by_block_the_block_of_the_damaged_layer_ranks_first(run, studied, tmp_path_factory):
    """The same ranges serve both kinds of groups."""
    folder = studied.parent / "by-block"
    assert run(folder, by="block")["worst"] == "block 3"


def test_what_was_measured_is_not_measured_again(run, studied, monkeypatch):
    """A study after an interrupted one, or with another budget, goes on from what is there."""
    before = (studied / SENSITIVITY_FILE).read_bytes()
    monkeypatch.setattr(Comparison, "measure", lambda *_: pytest.fail("measured again"))
    run(studied, budget=0.9)
    assert (studied / SENSITIVITY_FILE).read_bytes() == before


def test_the_quantizers_of_other_groups_are_off_while_one_is_measured(miniature, family, switches):
    """Whatever was measured before; FP8 weights have no quantizer of their input."""
    shapes = linears(miniature)
    for group in reversed(layer_groups(family, shapes, shapes)):
        layers, attention = quantized([group])
        switches.set(layers, attention=attention)
        on = switches.enabled()
        if group.attention:
            assert on and all(name.endswith(("bmm_quantizer", "softmax_quantizer")) for name in on)
            continue
        kinds = ["weight"] if group.name == ADALN_WEIGHTS else ["input", "weight"]
        assert on == sorted(f"{layer}.{kind}_quantizer" for layer in group.layers for kind in kinds)


def test_with_all_switches_off_the_velocity_is_the_modules_own(miniature, switches, inputs):
    """To the last bit: the reference needs no second copy of the weights."""
    switches.set({}, attention=False)
    plain = load_module("mmdit", miniature, torch.float32).model
    with torch.no_grad():
        assert torch.equal(switches.transformer(**inputs).sample, plain(**inputs).sample)


def test_the_study_measures_the_arithmetic_that_is_exported(miniature, decisions, switches, ranges, inputs):
    """The policy on the switches, after AdaLN had one scale, gives the exported module's velocity."""
    switches.set(dict.fromkeys(decisions, LayerPrecision.FP8), attention=True)
    switches.set({name: rule.precision for name, rule in decisions.items()}, attention=False)
    own = {name: ranges[name] for name in calibrated_layers(decisions)}
    exported = quantized_module(miniature, decisions, FP16, Remedies(), own, torch.float32).model
    with torch.no_grad():
        assert torch.equal(switches.transformer(**inputs).sample, exported(**inputs).sample)


def test_without_guidance_the_rows_with_a_prompt_alone_are_compared(miniature):
    """A transformer that nobody changed has no damage."""
    turbo = family_from_checkpoint(miniature, variant="large-turbo", t5_tokens=16)
    model = load_module("mmdit", miniature, torch.float32).model
    found = Comparison(turbo, miniature, model, [("a small blue cross", "")], 1, 0).measure()
    assert found.by_timestep == {"1000.0": {"prompt": 0.0}} and found.ssim == (1.0,)


def test_the_proposed_policy_is_read_and_quantizes_what_it_says(damaged, family, studied, result):
    """`--policy` takes the file; nothing that the default policy says is left of it."""
    proposal = result["proposal"]
    policy = read_policy(studied / POLICY_FILE)
    decided = policy.decide(linears(damaged))
    stored = {
        name
        for name, rule in decided.items()
        if rule.precision in (LayerPrecision.FP8, LayerPrecision.FP8_WEIGHTS)
    }
    assert sorted(stored) == proposal["layers"]
    assert {rule.group for rule in decided.values()} == {*proposal["kept"], *proposal["taken_out"]}
    precisions = {name: rule.precision for name, rule in decided.items()}
    shares = fp8_shares(family, linears(damaged), precisions, policy.attention_on("hopper") is FP8)
    assert shares == (proposal["linear_flops_share"], proposal["flops_share"])
    assert decided["transformer_blocks.0.norm1.linear"].precision is LayerPrecision.FP8_WEIGHTS


def test_the_proposal_reaches_its_budget_without_the_damaged_group(result):
    """What is said of it was measured with exactly its layers."""
    proposal = result["proposal"]
    assert "feed-forward out" in proposal["taken_out"] and proposal["mean_ssim"] >= 0.9
    assert (
        all(ssim < 0.9 for ssim in proposal["tried"][:-1]) and proposal["tried"][-1] == proposal["mean_ssim"]
    )


def test_the_chart_is_a_png_of_readable_size(studied):
    """At most 900 pixels wide, and so shown unscaled."""
    content = (studied / CHART_FILE).read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG") and 600 <= width <= 900 and height >= 400


def test_the_miniature_draws_its_own_captions_and_other_models_the_last_prompts(miniature, damaged):
    """What calibration takes from the head of its file is not measured on."""
    assert all("background" in prompt for prompt, _ in sensitivity._prompts(MINIATURE, 3))
    found = sensitivity._prompts(damaged, 3)
    assert found == sensitivity.calibration_prompts()[-3:]


def group(name, flops):
    return Group(name, ((name, LayerPrecision.FP8),), {name: LayerPrecision.FP8}, False, flops, flops)


def damage(error):
    return Damage(velocity_error=error, cosine_distance=error, by_timestep={}, ssim=(1 - error,))


def search(flops, errors, budget):
    """A proposal where the damages of groups add up."""
    groups = [group(name, count) for name, count in flops.items()]
    alone = {name: damage(error) for name, error in errors.items()}
    return propose(groups, alone, lambda kept: damage(sum(errors[each.name] for each in kept)), budget)


def test_the_worst_group_for_its_flops_is_taken_out_first():
    """A little more damage is kept for many more FLOPs."""
    found = search({"big": 1000, "small": 1, "good": 10}, {"big": 0.03, "small": 0.02, "good": 0.001}, 0.96)
    assert [each.name for each in found.taken_out] == ["small"]
    assert found.damage.mean_ssim == pytest.approx(0.969)


def test_adalns_weights_stay_unless_the_budget_needs_them():
    """They have no FLOPs to rank by: last out, or first where they alone miss the budget."""
    flops = {ADALN_WEIGHTS: 1, "one": 100, "other": 100}
    errors = {ADALN_WEIGHTS: 0.02, "one": 0.03, "other": 0.001}
    assert [each.name for each in search(flops, errors, 0.97).taken_out] == ["one"]
    assert [each.name for each in search(flops, errors, 0.985).taken_out] == [ADALN_WEIGHTS, "one"]


def test_a_budget_that_is_out_of_reach_is_refused_with_the_best_figure():
    """With all in FP16 any budget is reached: that is no proposal."""
    with pytest.raises(QuantizationError, match=r"0\.999.* 0\.99000, .* good; .*FP16"):
        search({"big": 1000, "good": 10}, {"big": 0.03, "good": 0.01}, 0.999)


@pytest.mark.parametrize(
    "given", [{"steps": 0}, {"budget": 0.0}, {"budget": 1.2}, {"budget": float("nan")}, {"by": "colour"}]
)
def test_what_cannot_be_studied_is_refused_before_anything_runs(run, tmp_path, monkeypatch, given):
    """A budget is a mean SSIM; groups are by role or block."""
    monkeypatch.setattr(sensitivity, "candidate_ranges", lambda *_: pytest.fail("ran"))
    with pytest.raises(QuantizationError, match="expected"):
        run(tmp_path / "sensitivity", **given)
