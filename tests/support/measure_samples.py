"""What the tests of gpu-check share: the inspector's text, outputs, variants.

The samples of the inspector's JSON are assumptions, put together after reports of TensorRT 8 to 10.
"""

from typing import Any

import numpy as np

from mmdit.artifact import Layout, Manifest, whole
from mmdit.contract import Precision

ATTENTION = (
    "[ONNX Layer: /blocks.0/attn/MatMul]\x1e[ONNX Layer: /Softmax]\x1e[ONNX Layer: /blocks.0/attn/MatMul_1]"
)


PROFILES = [
    {"latent": [[2, 4, 8, 8], [2, 4, 8, 8], [2, 4, 8, 8]], "timestep": [[2, 1], [2, 1], [2, 1]]},
    {"latent": [[1, 4, 8, 8], [4, 4, 8, 8], [4, 4, 16, 8]], "timestep": [[1, 1], [4, 1], [4, 1]]},
]


def layer(name: str, datatype: str, **more: str) -> dict[str, Any]:
    """A layer as the inspector has it, with one input."""
    return {"Name": name, "Inputs": [{"Name": "x", "Format/Datatype": datatype}], **more}


# TensorRT 10, after reports of Myelin's layers: datatypes by name, ONNX nodes in the metadata.
TEN = [
    layer("/ff/MatMul_myl0_7", "FP8", LayerType="gemm", TacticName="sm90_xmma_gemm_e4m3e4m3_f16"),
    layer(
        "_gemm_mha_v2_myl0_8", "Half", LayerType="kgen", TacticName="_gemm_mha_v2_0xbc", Metadata=ATTENTION
    ),
    layer("__myl_AddMean_myl0_9", "Half", LayerType="kgen", TacticName="__myl_AddMean_0xf2"),
    layer("/norm/Softmax_myl0_10", "Float", LayerType="kgen", Metadata="[ONNX Layer: /Softmax_1]"),
]


# Formats in words, as TensorRT 8 and 9 wrote them; 11 may name a fused attention so.
ELEVEN = [
    layer("to_q", "Row major linear FP8 format", LayerType="MatrixMultiply"),
    layer("attention", "Row major linear FP8 format", LayerType="Attention", TacticName="fmha_v2_e4m3"),
    layer("/attention/to_out/Add", "Row major linear FP16 format", LayerType="PointWise"),
    layer("copy", "Row major linear BFloat16", LayerType="Reformat"),
]


def outputs(**errors: float) -> dict[str, dict[str, np.ndarray]]:
    """Four ways' outputs: FP32 is ones, the others are off by a part of it."""
    exact = np.ones(8)
    return {
        way: {"velocity": exact + errors.get(way, 0.0)} for way in ("plan", "onnxruntime", "torch_fp16")
    } | {"torch_fp32": {"velocity": exact}}


def made(layout: Layout, attention: str) -> None:
    """An FP8 file and its engine, as the stages leave them."""
    made_from: dict[str, str] = {}
    for folder, file in (
        (layout.onnx("mmdit", Precision.FP8), "model.onnx"),
        (layout.engine("hopper", "mmdit", Precision.FP8), "model.plan"),
    ):
        settings = {"attention": attention}
        manifest = Manifest(kind="", checkpoint="", made_from=made_from, settings=settings, versions={})
        with whole(folder, manifest) as partial:
            (partial / file).write_text(attention)
        made_from = manifest.files


def times(median: float) -> dict[str, float]:
    return {"median": median, "min": median, "max": median, "runs": 5}
