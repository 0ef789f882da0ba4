"""What the scan sees, what it calls an overflow, and which remedies follow from it."""

import json

import pytest

import export.quiet  # noqa: F401  isort: skip
import torch
from torch import nn
from transformers import CLIPTokenizer, T5TokenizerFast
from transformers.activations import NewGELUActivation, QuickGELUActivation

from export.overflow import LARGEST, SAFETY, Activation, Scan, remedies_from_scan, saturates
from export.prompts import CalibrationSettings
from export.remedies import LARGEST_POWER
from export.scan import ACTIVATIONS_FILE, read_remedies, scan_component, write_scan
from export.tracing import example_inputs
from mmdit.contract import COMPONENTS, components
from mmdit.errors import ArtifactError, QuantizationError
from mmdit.family import TOKENIZERS, family_from_checkpoint
from mmdit.shapes import shape_set

CAPTION = "a large red circle on the left, on white"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ids(miniature):
    """Component → a caption's ids."""

    def of(component: str) -> torch.Tensor:
        kind, length = (T5TokenizerFast, 256) if component == "t5" else (CLIPTokenizer, 77)
        tokenizer = kind.from_pretrained(miniature / TOKENIZERS[component])
        return tokenizer([CAPTION], padding="max_length", max_length=length, return_tensors="pt").input_ids

    return of


@pytest.fixture(scope="module")
def t5(miniature, ids):
    """The scan of the miniature's T5."""
    return scan_component("t5", miniature, lambda module: module(ids("t5")))[0]


@pytest.fixture(scope="module")
def folder(miniature, tmp_path_factory):
    """A short scan of the whole miniature."""
    family = family_from_checkpoint(miniature)
    settings = CalibrationSettings.for_family(family, prompts=2, steps=2, batch=2)
    folder = tmp_path_factory.mktemp("scan")
    write_scan(family, miniature, settings, folder)
    return folder


def found(scan: Scan, module: str, operation: str, occurrence: int = 0) -> Activation:
    return next(
        a
        for a in scan.activations
        if (a.module, a.operation, a.occurrence) == (module, operation, occurrence)
    )


def test_operations_between_modules_are_seen(t5):
    """Attention's scores and weights, a gated product, a GELU's cube: a module's hook sees none of them."""
    attention, dense = "encoder.block.0.layer.0.SelfAttention", "encoder.block.1.layer.1.DenseReluDense"
    assert found(t5, attention, "_softmax").amax <= 1
    assert found(t5, attention, "bmm").amax > found(t5, attention, "bmm", 1).amax
    assert found(t5, dense, "mul").amax > 0
    gate = found(t5, f"{dense}.wi_0", "mm").amax
    assert found(t5, f"{dense}.act", "pow").amax == pytest.approx(gate**3)


def test_a_stream_is_what_a_fold_halves(t5):
    """The sum lies on it, a norm's square falls twice as fast, a branch's inside not at all."""
    assert found(t5, "encoder.block.1.layer.1", "add").falls == {"hidden": 1}
    assert found(t5, "encoder.block.1.layer.1.layer_norm", "pow").falls == {"hidden": 2}
    assert found(t5, "encoder.block.1.layer.1.DenseReluDense", "mul").falls == {}


def test_the_two_streams_of_the_mmdit_are_told_apart(miniature):
    """Each has a power of its own."""
    family = family_from_checkpoint(miniature)
    signature = components(family, shape_set(family))["mmdit"]
    inputs = [x.float() for x in example_inputs(signature, 1, (64, 64))]
    scan, _ = scan_component("mmdit", miniature, lambda module: module(*inputs))
    fallen = {stream: {a.module for a in scan.activations if stream in a.falls} for stream in scan.sunk}
    block = "model.transformer_blocks.1"
    assert {f"{block}.ff.net.2", f"{block}.attn.to_out.0", f"{block}.attn2.to_out.0"} <= fallen["image"]
    assert {f"{block}.ff_context.net.2", f"{block}.attn.to_add_out"} <= fallen["context"]
    assert not any({"image", "context"} <= set(a.falls) for a in scan.activations)


def test_what_the_graph_computes_in_fp32_is_no_overflow(t5):
    """T5's norm casts before it squares."""
    square = found(t5, "encoder.final_layer_norm", "pow")
    assert square.amax > LARGEST
    assert not square.fp16
    assert square not in t5.overflows()


def test_a_masks_constant_is_no_overflow(miniature, ids):
    """It is finfo.min, of whichever dtype."""
    scan, _ = scan_component("clip_l", miniature, lambda module: module(ids("clip_l")))
    attention = "model.text_model.encoder.layers.0.self_attn"
    assert found(scan, attention, "full").amax == 0
    assert 0 < found(scan, attention, "add").amax < 100


def test_what_sinks_into_subnormals_is_found(miniature, ids):
    """A branch scaled by 2^-24 lies below FP16's normal range as a whole."""

    def run(module: nn.Module) -> None:
        linear = module.model.text_model.encoder.layers[0].mlp.fc2.float()  # FP16 would hold zeros
        linear.weight.mul_(2.0**-24)
        linear.bias.mul_(2.0**-24)
        module(ids("clip_l"))

    scan, _ = scan_component("clip_l", miniature, run)
    assert [sunk.module for sunk in scan.sinks()] == ["model.text_model.encoder.layers.0.mlp.fc2"]
    assert scan.sinks()[0].subnormal == 1
    assert not remedies_from_scan(scan)


def test_a_value_that_fp32_cannot_hold_is_an_error(miniature, ids):
    """No fold and no island helps; the operation is named."""

    def run(module: nn.Module) -> None:
        module.encoder.block[1].layer[1].DenseReluDense.wo.weight.mul_(1e38)
        module(ids("t5"))

    with pytest.raises(QuantizationError, match=r"encoder.block.1.layer.1.*(inf|nan) in FP32"):
        scan_component("t5", miniature, run)


class Square(nn.Module):
    """Overflows, and no tanh or sigmoid saves it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x / 65504


@pytest.mark.parametrize(
    ("function", "harmless"),
    [(NewGELUActivation(), True), (QuickGELUActivation(), True), (nn.SiLU(), True), (Square(), False)],
)
def test_an_infinity_in_front_of_a_tanh_is_harmless(function, harmless):
    """Shown by all finite FP16 numbers, not assumed."""
    assert saturates(function) is harmless


def activation(module: str, operation: str, amax: float, **falls: int) -> Activation:
    return Activation(
        module=module,
        operation=operation,
        occurrence=0,
        amax=amax,
        rms=1.0,
        subnormal=0.0,
        fp16=True,
        falls=falls,
    )


def scan_of(*activations: Activation, held: tuple[str, ...] = ("",), **given) -> Scan:
    """A scan in which the modules of `held` take and give 1, and all others what FP16 cannot hold."""
    modules = {prefix for a in activations for prefix in prefixes(a.module)}
    return Scan(
        activations=activations,
        boundaries=tuple(activation(m, "output", 1.0 if m in held else 1e6) for m in sorted(modules)),
        sunk={"hidden": {"embedding": [0.25] * LARGEST_POWER}},
        **given,
    )


def prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def test_an_island_is_the_smallest_submodule_with_inputs_and_outputs_that_fp16_holds():
    """Up from the operation, past those whose own output overflows."""
    scan = scan_of(activation("block.1.ff.act", "mul", 1e6), held=("", "block.1", "block.1.ff"))
    assert [island.module for island in remedies_from_scan(scan).islands] == ["block.1.ff"]


def test_a_list_of_submodules_is_no_island():
    """It is never called, so nothing could cast what goes in and comes out."""
    scan = Scan(
        activations=(activation("blocks.1", "mul", 1e6),),
        boundaries=(activation("blocks.1", "output", 1e6), activation("", "output", 1.0)),
    )
    assert [island.module for island in remedies_from_scan(scan).islands] == [""]


def test_what_comes_near_the_end_of_fp16_is_an_overflow():
    """Other prompts go higher than those that were scanned."""
    near = activation("block", "mul", LARGEST / SAFETY * 1.01)
    far = activation("block", "mul", LARGEST / SAFETY)
    assert scan_of(near, far).overflows() == [near]


def test_an_island_in_an_island_is_not_named():
    """Only whole names count: block.11 does not lie in block.1."""
    scan = scan_of(
        activation("block.1.ff", "mul", 1e6),
        activation("block.1", "mul", 1e6),
        activation("block.11", "mul", 1e6),
        held=("block.1.ff", "block.1", "block.11"),
    )
    assert {island.module for island in remedies_from_scan(scan).islands} == {"block.1", "block.11"}


def test_what_no_submodule_holds_makes_the_whole_an_island():
    """And an output that FP16 cannot carry is reported, for nothing mends it."""
    scan = scan_of(activation("block.1", "mul", 1e6), held=())
    assert [island.module for island in remedies_from_scan(scan).islands] == [""]
    assert [a.module for a in scan.beyond()] == [""]


def test_a_fold_that_would_have_to_pass_its_largest_power_leaves_an_island():
    """2^15 is as far as a fold goes."""
    amax = LARGEST / SAFETY * 2.0 ** (LARGEST_POWER + 1)
    remedies = remedies_from_scan(scan_of(activation("block", "add", amax, hidden=1), held=("block",)))
    assert [fold.power for fold in remedies.folds] == [LARGEST_POWER]
    assert [island.module for island in remedies.islands] == ["block"]
    assert "25.00%" in remedies.folds[0].reason


@pytest.mark.parametrize(("output", "islands"), [(1.0, []), (1e6, ["block"])])
def test_a_saturating_function_is_excused_only_while_its_output_is_held(output, islands):
    """What it gives is not in front of its own tanh."""
    scan = Scan(
        activations=(activation("block.act", "pow", 1e6),),
        boundaries=(activation("block.act", "output", output), activation("block", "output", 1.0)),
        saturating=("block.act",),
    )
    assert [island.module for island in remedies_from_scan(scan).islands] == islands


def test_the_miniature_needs_no_remedies(folder):
    """Measured: nothing of it goes beyond 18,300, the cube inside of T5's GELU."""
    remedies = read_remedies(folder)
    assert set(remedies) == set(COMPONENTS)
    assert not any(remedies.values())


def test_the_file_says_how_it_was_made(folder):
    """Every tensor by magnitude, the settings, what was measured where and with which tools."""
    content = json.loads((folder / ACTIVATIONS_FILE).read_text())
    assert content["settings"]["prompts"] == 2
    assert {"prompts_sha256", "timesteps", "device", "versions", "safety_factor"} < set(content)
    for component in content["components"].values():
        magnitudes = [tensor["amax"] for tensor in component["tensors"]]
        assert magnitudes == sorted(magnitudes, reverse=True)
        assert len(magnitudes) > 50


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"components": {"t5": {}}}'])
def test_a_file_that_is_no_scan_is_refused(text, tmp_path):
    """With its path, and what to do."""
    (tmp_path / ACTIVATIONS_FILE).write_text(text)
    with pytest.raises(ArtifactError, match="run the scan again"):
        read_remedies(tmp_path)
