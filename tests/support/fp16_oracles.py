"""What FP16 really computes: torch on the CPU, and an ONNX file with every intermediate as an output.

A plain run of ONNX Runtime's CPU provider is no oracle: it computes in FP32 and casts at the ends.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

import export.quiet  # noqa: F401  isort: skip
import torch
from onnx import NodeProto

from export.modules import explicit_attention, load_module
from export.onnx_from_checkpoint import ONNX_FILE, write_onnx
from export.remedies import Remedies, apply_remedies
from mmdit.contract import components
from mmdit.family import family_from_checkpoint
from mmdit.shapes import shape_set


def in_torch(component: str, checkpoint: Path, remedies: Remedies, inputs) -> list[np.ndarray]:
    """The outputs of torch in FP16 on the CPU."""
    module = load_module(component, checkpoint, torch.float16)
    apply_remedies(component, module, remedies)
    with torch.no_grad(), explicit_attention():
        output = module(*inputs)
    return [tensor.numpy() for tensor in (output if isinstance(output, tuple) else (output,))]


@dataclass
class OnnxRun:
    """A file's outputs in a plain run and with everything exposed; each FP16 node, and tensors by name."""

    plain: list[np.ndarray]
    exposed: list[np.ndarray]
    nodes: list[tuple[NodeProto, np.ndarray]]
    tensors: dict[str, np.ndarray]

    def infinite(self) -> set[str]:
        """The modules (see `path_of`) of nodes that gave something not finite."""
        return {path_of(node) for node, value in self.nodes if not finite([value])}

    def first_infinite(self) -> set[str]:
        """The modules of nodes that gave something not finite from what was finite."""
        return {
            path_of(node)
            for node, value in self.nodes
            if not finite([value])
            and finite(self.tensors[name] for name in node.input if name in self.tensors)
        }


def in_onnx(component: str, checkpoint: Path, remedies: Remedies, inputs, folder: Path) -> OnnxRun:
    """Write the component's ONNX file into `folder` and run it twice."""
    family = family_from_checkpoint(checkpoint)
    signature = components(family, shape_set(family))[component]
    write_onnx(component, signature, checkpoint, remedies, folder)
    feed = {tensor.name: value.numpy() for tensor, value in zip(signature.inputs, inputs, strict=True)}
    model = onnx.load(folder / ONNX_FILE)
    plain = _run(model, feed)
    known = {value.name for value in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name and name not in known]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    tensors = _run(model, feed)
    # A mask's -65504 and a negative score may give -inf, which softmax turns into the 0 that is wanted.
    masked = {node.input[0] for node in model.graph.node if node.op_type == "Softmax"}
    nodes = [
        (node, tensors[node.output[0]])
        for node in model.graph.node
        if node.output[0] not in masked and tensors[node.output[0]].dtype == np.float16
    ]
    return OnnxRun(list(plain.values()), [tensors[name] for name in plain], nodes, tensors)


def _run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3  # outputs without shapes make it warn
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def path_of(node: NodeProto) -> str:
    """A node's module, as far as the exporter tells."""
    return ".".join(node.name.split("/")[1:-1])


def same_module(path: str, module: str) -> bool:
    """Whether the exporter's path is that module's; it counts parts of one name: "wo_1" is the second wo."""
    return module.endswith(path) or module.endswith(re.sub(r"_\d+(?=\.|$)", "", path))


def finite(values: Iterable[np.ndarray]) -> bool:
    """Whether there is no infinity and no NaN."""
    return all(np.isfinite(value).all() for value in values)


def worst_error(found: list[np.ndarray], expected: Iterable[torch.Tensor]) -> float:
    """The largest relative error (Frobenius) of the outputs."""
    return max(
        float(np.linalg.norm(ours.astype(np.float64) - theirs.double().numpy()) / theirs.double().norm())
        for ours, theirs in zip(found, expected, strict=True)
    )
