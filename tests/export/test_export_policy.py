"""The precision policy: rules by a layer's role, a user's rules before them, FP32 islands over both."""

import pytest

from export.checkpoint import linears
from export.policy import (
    AttentionPrecision,
    LayerPrecision,
    Policy,
    Rule,
    calibrated_layers,
    calibration_digest,
    fp32_layers,
    read_policy,
    with_islands,
)
from mmdit.errors import QuantizationError

LARGE = {
    "transformer_blocks.0.attn.to_q": LayerPrecision.FP8,
    "transformer_blocks.37.attn2.to_out.0": LayerPrecision.FP8,
    "transformer_blocks.5.attn.to_add_out": LayerPrecision.FP8,
    "transformer_blocks.12.ff_context.net.0.proj": LayerPrecision.FP8,
    "transformer_blocks.12.ff.net.2": LayerPrecision.FP8,
    "transformer_blocks.23.norm1.linear": LayerPrecision.FP8_WEIGHTS,
    "transformer_blocks.23.norm1_context.linear": LayerPrecision.FP8_WEIGHTS,
    "norm_out.linear": LayerPrecision.FP16,
    "context_embedder": LayerPrecision.FP16,
    "time_text_embed.text_embedder.linear_1": LayerPrecision.FP16,
    "proj_out": LayerPrecision.FP16,
}


@pytest.fixture
def own(tmp_path):
    """A user's policy of the given text, read."""

    def read(text: str) -> Policy:
        (tmp_path / "policy.toml").write_text(text)
        return read_policy(tmp_path / "policy.toml")

    return read


def rule(pattern: str, precision: str) -> str:
    return f"[[rule]]\npattern = '{pattern}'\nprecision = '{precision}'\n"


def test_the_policy_goes_by_a_layers_role():
    """Whatever the number of its block; and each decision has a reason and a group."""
    decisions = read_policy().decide(LARGE)
    assert {name: rule.precision for name, rule in decisions.items()} == LARGE
    assert all(rule.reason and rule.group for rule in decisions.values())


def test_the_miniatures_linears_are_read_without_its_weights(miniature):
    """Every linear of the transformer, by the names that the policy's patterns are about."""
    layers = linears(miniature)
    decisions = read_policy().decide(layers)
    kinds = [rule.precision for rule in decisions.values()]
    assert (kinds.count(LayerPrecision.FP8), kinds.count(LayerPrecision.FP8_WEIGHTS)) == (53, 8)
    assert layers["transformer_blocks.0.ff.net.0.proj"] == (768, 192)


def test_a_users_rule_goes_before_the_projects(own):
    """For the layers that its pattern matches whole, and no others."""
    decisions = own(rule(r"transformer_blocks\.37\..*", "fp16")).decide(LARGE)
    assert decisions["transformer_blocks.37.attn2.to_out.0"].precision is LayerPrecision.FP16
    assert decisions["transformer_blocks.0.attn.to_q"].precision is LayerPrecision.FP8


def test_a_pattern_that_matches_nothing_is_refused(own):
    """It is a mistyped name, and would silently quantize what it should not."""
    with pytest.raises(QuantizationError, match=r"'transformer_block.0..\*' matches none of the 11 layers"):
        own(rule("transformer_block.0..*", "fp16")).decide(LARGE)


def test_layers_without_a_rule_are_refused():
    """A policy says something about every layer."""
    policy = Policy(rule=(Rule(pattern="proj_out", precision=LayerPrecision.FP16),))
    with pytest.raises(QuantizationError, match=r"no rule of the policy matches .*'\.\*'"):
        policy.decide(LARGE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[rule]", "cannot be read"),
        (rule("proj_out", "int8"), r"rule.0.precision is 'int8'"),
        (rule("(", "fp16"), "not a regular expression"),
        ("[[rules]]\npattern = 'a'", "rules"),
        ("[attention]\nhopper = 'fp4'", "attention.hopper is 'fp4'"),
        ("[attention]\nhoper = 'fp8'", "hoper is no target: expected default, hopper, ada"),
    ],
)
def test_a_file_that_is_no_policy_is_refused(text, words, own):
    """In one line that names the file and the place."""
    with pytest.raises(QuantizationError, match=words) as refused:
        own(text)
    assert "policy.toml" in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_policy_is_refused(tmp_path):
    """By its path."""
    with pytest.raises(QuantizationError, match="none.toml cannot be read"):
        read_policy(tmp_path / "none.toml")


def test_attention_goes_by_target(own):
    """A target's own entry, else the default."""
    policy = own("[attention]\nada = 'fp8'")
    assert policy.attention_on("ada") is AttentionPrecision.FP8
    assert policy.attention_on("hopper") is policy.attention_on("auto") is AttentionPrecision.FP16


def test_layers_inside_an_island_are_fp32():
    """Whatever the policy says about them; with the island's reason."""
    decisions = with_islands(read_policy().decide(LARGE), {"transformer_blocks.12.ff": "reaches 7e4"})
    island = decisions["transformer_blocks.12.ff.net.2"]
    assert (island.precision, island.reason) == (LayerPrecision.FP32, "reaches 7e4")
    assert decisions["transformer_blocks.12.ff_context.net.0.proj"].precision is LayerPrecision.FP8


def test_an_island_of_everything_leaves_nothing_quantized():
    """The module at the root."""
    decisions = with_islands(read_policy().decide(LARGE), {"": "all of it"})
    assert {rule.precision for rule in decisions.values()} == {LayerPrecision.FP32}


def test_a_rule_may_have_a_layer_in_fp32(own):
    """It becomes an island of its own; those of the scan are not counted twice."""
    decisions = own(rule("proj_out", "fp32")).decide(LARGE)
    islanded = with_islands(decisions, {"transformer_blocks.12.ff": "reaches 7e4"})
    assert fp32_layers(islanded) == {"proj_out": "chosen by hand"}


def test_the_calibrations_hash_follows_the_quantized_inputs(own):
    """AdaLN's weights need no calibration; one more layer in FP16, or attention in FP8, needs another."""
    base = read_policy().decide(LARGE)
    fp16 = AttentionPrecision.FP16
    weights = own(rule(r".*norm1.*", "fp16")).decide(LARGE)
    fewer = own(rule(r".*\.ff\.net\.2", "fp16")).decide(LARGE)
    assert calibration_digest(base, fp16) == calibration_digest(weights, fp16)
    assert calibration_digest(base, fp16) != calibration_digest(fewer, fp16)
    assert calibration_digest(base, fp16) != calibration_digest(base, AttentionPrecision.FP8)
    assert len(calibrated_layers(base)) == len(calibrated_layers(fewer)) + 1
