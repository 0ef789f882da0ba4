"""FP8 together with the remedies against overflow: folds, the scan's islands, and a policy's own."""

import json
import shutil

import onnx
import onnxruntime
import pytest
from doctored import HIDDEN, STREAMS, doctored

import export.quiet  # noqa: F401  isort: skip
import modelopt.torch.quantization as mtq
import numpy as np
import torch

from engines.checks.readiness import check_ready
from engines.source import Source
from export.audit import write_audit
from export.checkpoint import linears
from export.fp8_from_calibration import quantized_module, write_fp8_onnx
from export.modules import load_module
from export.onnx_from_checkpoint import ONNX_FILE
from export.policy import AttentionPrecision, read_policy, with_islands
from export.quantization import input_quantizers, insert_quantizers
from export.remedies import Fold, Island, Remedies
from export.stages import Export
from mmdit.artifact import Layout, Manifest
from mmdit.contract import Precision, components
from mmdit.family import family_from_checkpoint
from mmdit.shapes import shape_set

BLOCK = "transformer_blocks.1.ff_context"
FOLDS = Remedies(
    folds=tuple(
        Fold(stream=stream, power=power, magnitude=1e6, tensor="add", reason="too large")
        for stream, power in (("image", 7), ("context", 5))
    )
)
ISLAND = Remedies(
    islands=(Island(module=f"model.{BLOCK}", magnitude=1e6, tensor="linear", reason="too large"),)
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("attention", AttentionPrecision, ids=lambda value: f"attention in {value.value}")
@pytest.mark.parametrize(
    ("name", "doctoring", "remedies", "measured"),
    [("folds", STREAMS, FOLDS, 0.148), ("island", HIDDEN, ISLAND, 0.042)],
)
def test_a_doctored_checkpoint_stays_right_in_fp8(
    name, doctoring, remedies, measured, attention, miniature, denoising, tmp_path
):
    """The FP8 file of a model that FP16 cannot hold is finite, as near to FP32 as FP8 is, and audited."""
    checkpoint = doctored(miniature, {"mmdit": doctoring["mmdit"]}, tmp_path / "checkpoint")
    family = family_from_checkpoint(checkpoint)
    signature = components(family, shape_set(family))["mmdit"]
    islands = {island.module.removeprefix("model."): island.reason for island in remedies.islands}
    decisions = with_islands(read_policy().decide(linears(checkpoint)), islands)
    inputs = denoising(500.0, 80, 112)
    tensors = [torch.from_numpy(inputs[tensor.name]).float() for tensor in signature.inputs]
    ranges = observed(load_module("mmdit", checkpoint, torch.float32), decisions, attention, tensors)
    with torch.no_grad():
        expected = load_module("mmdit", checkpoint, torch.float32)(*tensors).numpy()
    write_fp8_onnx(quantized_module(checkpoint, decisions, attention, remedies, ranges), signature, tmp_path)
    write_audit(tmp_path, family, decisions, attention, {"mmdit": remedies})
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(tmp_path / ONNX_FILE), options)
    found = session.run(None, inputs)[0].astype(np.float32)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"\n{name}, attention in {attention.value}: {error:.1%} from FP32")
    assert np.isfinite(found).all() and error < 1.25 * measured
    content = json.loads((tmp_path / "audit.json").read_text())
    precisions = {layer["name"]: layer["precision"] for layer in content["layers"]}
    wanted = "fp32" if name == "island" else "fp8"
    assert precisions[f"{BLOCK}.net.2"] == precisions[f"{BLOCK}.net.0.proj"] == wanted


def observed(module, decisions, attention, tensors) -> dict[str, float]:
    """The ranges of one call, as calibration finds them."""
    insert_quantizers(module.model, decisions, attention)
    with torch.no_grad():
        mtq.calibrate(module.model, algorithm="max", forward_loop=lambda _: module(*tensors))
    return {name: float(quantizer.amax) for name, quantizer in input_quantizers(module.model).items()}


def test_attention_inside_an_island_is_not_quantized(build, miniature, tmp_path):
    """Its products run in FP32 with the rest of the island; the others in FP8. TensorRT can fuse both."""
    remedies = Remedies(
        islands=(
            Island(module="model.transformer_blocks.2.attn", magnitude=1e6, tensor="add", reason="large"),
        )
    )
    decisions = with_islands(read_policy().decide(linears(miniature)), {"transformer_blocks.2.attn": "large"})
    family = family_from_checkpoint(miniature)
    ranges = dict.fromkeys(
        [name for name, rule in decisions.items() if rule.precision.value == "fp8"]
        + [
            f"transformer_blocks.{block}.{attention}.{operand}"
            for block, attention in ((0, "attn"), (0, "attn2"), (1, "attn"), (1, "attn2"), (3, "attn"))
            for operand in "qkv"
        ],
        4.0,
    )
    module = quantized_module(miniature, decisions, AttentionPrecision.FP8, remedies, ranges)
    signature = components(family, shape_set(family))["mmdit"]
    write_fp8_onnx(module, signature, tmp_path)
    write_audit(tmp_path, family, decisions, AttentionPrecision.FP8, {"mmdit": remedies})
    manifest = Manifest(kind="onnx", checkpoint="", made_from={}, settings={}, versions={})
    assert check_ready(Source("mmdit", Precision.FP8, tmp_path, manifest), signature)["attention_fuses"]
    found = {each["name"]: each for each in json.loads((tmp_path / "audit.json").read_text())["attention"]}
    assert found["transformer_blocks.2.attn"]["precision"] == "fp32"
    assert [name for name, each in found.items() if each["precision"] == "fp8"] == [
        name for name in found if name != "transformer_blocks.2.attn"
    ]


def test_a_policys_fp32_layer_is_exported_as_an_island(build, miniature, tmp_path, monkeypatch):
    """Through the stages: calibration, file and audit agree; its weight is stored in FP32."""
    copied = Layout(str(miniature), tmp_path)
    for folder in (build.scan, build.onnx("mmdit")):
        shutil.copytree(folder, copied.root / folder.relative_to(build.root))
    policy = tmp_path / "policy.toml"
    policy.write_text("[[rule]]\npattern = 'proj_out'\nprecision = 'fp32'\nreason = 'to see'\n")
    # the quantized inputs are the default policy's, so its calibration fits
    Export(str(miniature), tmp_path).fp8(policy=policy, calibration=build.calibration / "calibration.json")
    folder = copied.onnx("mmdit", Precision.FP8)
    layers = {each["name"]: each for each in json.loads((folder / "audit.json").read_text())["layers"]}
    assert (layers["proj_out"]["precision"], layers["proj_out"]["reason"]) == ("fp32", "to see")
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(folder / ONNX_FILE).graph.initializer}
    assert stored["model.proj_out.weight"] == onnx.TensorProto.FLOAT
