"""What TensorRT made of a graph, from its engine inspector: precisions, and how much of attention it fused.

The inspector's JSON is nowhere specified. What is read here is what reports of TensorRT 8 to 10 show:
"Layers" with "Name", "LayerType", "Inputs" and "Outputs" with a "Format/Datatype" (in words, "Row major
linear FP16 format", or a type, "Half"), "TacticName", and "Metadata" with the ONNX nodes of a layer. That 11
writes the same is an assumption: what is not understood is counted as unknown, never left out.
"""

import json
import re
from collections import Counter
from typing import Any

from pydantic import BaseModel, ConfigDict

_TYPES = (  # the narrowest first: it decides
    ("fp8", re.compile(r"fp8|float8|e4m3", re.I)),
    ("int8", re.compile(r"\bint8", re.I)),
    ("bf16", re.compile(r"bf16|bfloat16", re.I)),
    ("fp16", re.compile(r"fp16|half|float16", re.I)),
    ("fp32", re.compile(r"fp32|tf32|float", re.I)),
    ("integers", re.compile(r"int|bool", re.I)),
)
_FUSED = re.compile(r"mha|flash_?attention|(?<![a-z])attention_?v?\d*(?![a-z])", re.I)
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_SOFTMAX = re.compile(r"softmax", re.I)
_PRODUCT = re.compile(r"gemm|matmul|matrix_?multiply|conv|mha", re.I)


class Summary(BaseModel):
    """Layers by the narrowest type of their inputs; `products` are those that multiply matrices or convolve.

    `attention_fused` counts layers that hold a softmax and both of its products, by type; `softmax_alone`
    those that hold a softmax and do not. `unknown` layers say no type; all do, unless the plan has details.
    """

    model_config = ConfigDict(frozen=True)

    layers: dict[str, int]
    products: dict[str, int]
    attention_fused: dict[str, int]
    softmax_alone: int
    unknown: int

    @property
    def fused_share(self) -> float | None:
        """Of the softmaxes, how many are inside a fused attention; None without any."""
        fused = sum(self.attention_fused.values())
        return fused / (fused + self.softmax_alone) if fused + self.softmax_alone else None


def summary(text: str) -> Summary:
    """Read what `EngineInspector.get_engine_information` gave as JSON; raises ValueError when it is none."""
    content = json.loads(text)
    found = content.get("Layers", []) if isinstance(content, dict) else content
    layers, products, fused = Counter[str](), Counter[str](), Counter[str]()
    alone = 0
    for entry in found:
        layer = entry if isinstance(entry, dict) else {"Name": str(entry)}
        precision = _precision(layer)
        layers[precision] += 1
        if _PRODUCT.search(_words(layer, "Name", "LayerType", "TacticName")):
            products[precision] += 1
        if _is_attention(layer):
            fused[precision] += 1
        elif _SOFTMAX.search(_words(layer, "Name", "LayerType", "Metadata")):
            alone += 1
    return Summary(
        layers=dict(layers),
        products=dict(products),
        attention_fused=dict(fused),
        softmax_alone=alone,
        unknown=layers["unknown"],
    )


def _words(layer: dict[str, Any], *keys: str) -> str:
    return " ".join(str(layer.get(key, "")) for key in keys)


def _precision(layer: dict[str, Any]) -> str:
    tensors = layer.get("Inputs") or layer.get("Outputs") or []
    words = " ".join(str(tensor.get("Format/Datatype", "")) for tensor in tensors if isinstance(tensor, dict))
    return next((name for name, pattern in _TYPES if pattern.search(words)), "unknown")


def _is_attention(layer: dict[str, Any]) -> bool:
    """By the nodes that a layer was made from where it tells them, else by its kernel's or its own name."""
    nodes = _ONNX.findall(str(layer.get("Metadata", "")))
    if any(_SOFTMAX.search(node) for node in nodes):
        return sum("matmul" in node.lower() for node in nodes) >= 2
    # A layer's own name may be the module's, such as /attn/to_q/MatMul: only a kernel's is trusted then.
    kernel = _words(layer, "TacticName", "LayerType")
    name = str(layer.get("Name", ""))
    return bool(_FUSED.search(kernel) or re.search(r"_gemm_mha|fmha", name, re.I))
