"""Folds and islands on a loaded module: what they may not change, and what the traced graph then holds."""

import onnx
import onnxruntime
import pytest

import export.quiet  # noqa: F401  isort: skip
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from onnx import TensorProto
from pydantic import ValidationError

from export.folding import SMALLEST_NORMAL, streams, sunk_weights
from export.modules import Mmdit, VaeDecoder, explicit_attention, load_module
from export.onnx_from_checkpoint import ONNX_FILE, write_onnx
from export.remedies import Fold, Island, Remedies, apply_remedies
from export.tracing import example_inputs
from mmdit.contract import COMPONENTS, components
from mmdit.errors import QuantizationError
from mmdit.family import family_from_checkpoint
from mmdit.shapes import shape_set

ODD = (80, 112)  # 35 image tokens
# Of a row alone against the same row of three, as tests/export/test_export_onnx.py measured without folds.
ROW_MEASURED = 3.4e-4


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def signatures(miniature):
    family = family_from_checkpoint(miniature)
    return components(family, shape_set(family))


def folds(**powers: int) -> Remedies:
    return Remedies(
        folds=tuple(
            Fold(stream=stream, power=power, magnitude=1e6, tensor="x: add", reason="")
            for stream, power in powers.items()
        )
    )


def islands(*modules: str) -> Remedies:
    return Remedies(
        islands=tuple(Island(module=m, magnitude=1e6, tensor="x: mul", reason="") for m in modules)
    )


def outputs(module, inputs, dtype=torch.float32) -> list[torch.Tensor]:
    given = [x.to(dtype) if x.dtype == torch.float16 else x for x in inputs]
    with torch.no_grad(), explicit_attention():
        output = module(*given)
    return list(output) if isinstance(output, tuple) else [output]


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_fold_changes_no_bit_of_what_fp32_computes(component, miniature, signatures):
    """A power of two moves exponents only, and a norm divides it out: equality, not closeness."""
    inputs = example_inputs(signatures[component], 3, ODD, seed=1)
    expected = outputs(load_module(component, miniature, torch.float32), inputs)
    for power in (1, 6, 14):
        module = load_module(component, miniature, torch.float32)
        powers = {stream: power + index for index, stream in enumerate(streams(component, module))}
        apply_remedies(component, module, folds(**powers))
        found = outputs(module, inputs)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("dual", "norm"), [((), "rms_norm"), ((0, 1, 2), None)], ids=["like large", "all dual, no qk norm"]
)
def test_other_mmdits_fold_as_exactly(dual, norm):
    """SD3.5 Large has no second attention; the last block may have one."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=12,
        dual_attention_layers=dual,
        qk_norm=norm,
    )
    module = Mmdit(model).eval()
    inputs = (
        torch.randn(2, 16, 10, 14),
        torch.tensor([[1000.0], [3.5]]),
        torch.randn(2, 5, 24),
        torch.randn(2, 12),
    )
    expected = outputs(module, inputs)[0]
    apply_remedies("mmdit", module, folds(image=5, context=11))
    assert torch.equal(outputs(module, inputs)[0], expected)


def test_a_vae_without_attention_and_with_a_quantization_convolution_folds_as_exactly():
    """SD3.5's VAE has the one and lacks the other."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        up_block_types=("UpDecoderBlock2D",) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    module = VaeDecoder(model).eval()
    latent = torch.randn(1, 4, 5, 7)
    expected = outputs(module, [latent])[0]
    apply_remedies("vae_decoder", module, folds(hidden=9))
    assert torch.equal(outputs(module, [latent])[0], expected)


def test_a_fold_makes_the_stream_smaller_by_its_power(miniature, signatures):
    """What enters the last norm is 2^-k of what it was: that is the room that FP16 gains."""
    inputs = example_inputs(signatures["mmdit"], 2, ODD)
    seen = []
    for power in (0, 4):
        module = load_module("mmdit", miniature, torch.float32)
        apply_remedies("mmdit", module, folds(image=power) if power else Remedies())
        module.model.norm_out.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        outputs(module, inputs)
    assert torch.equal(seen[0], seen[1] * 2**4)


def test_the_weights_that_a_fold_makes_subnormal_are_counted(miniature):
    """Each share is what FP16 says of the folded weight itself."""
    module = load_module("t5", miniature, torch.float32)
    stream = streams("t5", module)["hidden"]
    shares = sunk_weights(stream)
    for name, weight in stream.weights.items():
        for power in (1, 7, 15):
            normal, after = weight.abs() >= SMALLEST_NORMAL, (weight * 2.0**-power).abs() < SMALLEST_NORMAL
            assert shares[name][power - 1] == pytest.approx(float((normal & after).float().mean()))
    assert shares["encoder.embed_tokens.weight"][14] > 0.5


def test_a_folded_t5_has_no_clamp_and_its_rows_know_nothing_of_each_other(miniature, signatures, tmp_path):
    """transformers' `isinf(...).any()` would look at the whole batch."""
    write_onnx("t5", signatures["t5"], miniature, folds(hidden=4), tmp_path)
    kinds = {node.op_type for node in onnx.load(tmp_path / ONNX_FILE).graph.node}
    assert not kinds & {"IsInf", "IsNaN", "Clip", "ReduceMax"}
    session = onnxruntime.InferenceSession(tmp_path / ONNX_FILE, providers=["CPUExecutionProvider"])
    ids = example_inputs(signatures["t5"], 3, (0, 0))[0].numpy()
    together = torch.from_numpy(session.run(None, {"input_ids": ids})[0]).float()
    for row in range(3):
        alone = torch.from_numpy(session.run(None, {"input_ids": ids[row : row + 1]})[0]).float()
        assert (alone[0] - together[row]).norm() / together[row].norm() <= 2 * ROW_MEASURED


@pytest.mark.parametrize(
    ("component", "path"),
    [
        ("clip_l", "model.text_model.encoder.layers.1"),
        ("clip_g", ""),
        ("t5", "encoder.block.0.layer.0"),
        ("mmdit", "model.transformer_blocks.1"),
        ("vae_decoder", "model.decoder.mid_block"),
    ],
)
def test_an_island_computes_in_fp32_between_two_casts(component, path, miniature, signatures, tmp_path):
    """Its weights are FP32 in the file, the others FP16; the component's tensors stay the contract's."""
    remedies = islands(path)
    module = load_module(component, miniature, torch.float16)
    apply_remedies(component, module, remedies)
    inputs = example_inputs(signatures[component], 2, ODD)
    found = outputs(module, inputs, torch.float16)
    assert {output.dtype for output in found} == {torch.float16}
    full = outputs(load_module(component, miniature, torch.float32), inputs)
    for ours, theirs in zip(found, full, strict=True):
        # random ids and latents: FP16 alone is up to 1.3 % off (test_export_onnx.random_inputs)
        assert (ours.float() - theirs).norm() / theirs.norm() < 0.03

    in_island = {
        name
        for name, weight in module.named_parameters()
        if weight.dtype == torch.float32 and (not path or name.startswith(f"{path}."))
    }
    assert in_island == {name for name, weight in module.named_parameters() if weight.dtype == torch.float32}
    assert in_island
    write_onnx(component, signatures[component], miniature, remedies, tmp_path)
    graph = onnx.load(tmp_path / ONNX_FILE).graph
    half = [t for t in graph.initializer if t.data_type == TensorProto.FLOAT16]
    full_sizes = sum(
        torch.Size(t.dims).numel() for t in graph.initializer if t.data_type == TensorProto.FLOAT
    )
    assert full_sizes >= sum(dict(module.named_parameters())[name].numel() for name in in_island)
    assert bool(half) == bool(path)
    assert "Cast" in {node.op_type for node in graph.node}


def test_remedies_survive_json():
    """They are an artifact's content."""
    remedies = Remedies(folds=folds(image=3).folds, islands=islands("model.proj_out").islands)
    assert Remedies.model_validate_json(remedies.model_dump_json()) == remedies
    assert remedies
    assert not Remedies()


@pytest.mark.parametrize("remedies", [folds(hidden=1), islands("model.transformer_blocks.9")])
def test_remedies_of_another_model_are_refused(remedies, miniature):
    """Half-applied remedies would be worse than none."""
    module = load_module("mmdit", miniature, torch.float16)
    with pytest.raises(QuantizationError, match="scan this"):
        apply_remedies("mmdit", module, remedies)


@pytest.mark.parametrize("power", [0, 16])
def test_a_power_lies_between_1_and_15(power):
    """2^16 is no number of FP16, and CLIP's graph multiplies by it."""
    with pytest.raises(ValidationError):
        folds(hidden=power)
