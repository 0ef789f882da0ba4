"""ModelOpt's exported quantizers → ONNX's own Q/DQ, with the weights stored as E4M3.

ModelOpt traces each quantizer as `trt::TRT_FP8QuantizeLinear` and `trt::TRT_FP8DequantizeLinear` over a
16-bit weight. Its own FP8QuantExporter is not used for the rest (modelopt 0.47): it would also quantize
the patch embedding's weights and the softmax of attention whose other operands are not quantized, divides
by the scale in FP16 before it rounds, and peaks at eight times the weights' bytes of memory.
"""

from collections import defaultdict

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.quantization import E4M3_MAX

_QUANTIZE, _DEQUANTIZE = "TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear"
_ZERO = "fp8_zero_point"


def native_fp8(model: onnx.ModelProto) -> None:
    """Rewrite a traced model in place, one weight at a time.

    A quantized weight becomes an E4M3 initializer and a DequantizeLinear, its transpose folded in; a
    quantized activation a QuantizeLinear and a DequantizeLinear with a scalar scale.
    """
    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    constants = {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)

    gone: set[str] = set()  # nodes by their first output
    for node in graph.node:
        if node.op_type != _QUANTIZE:
            continue
        quantizer = node.name.rsplit("/", 1)[0]
        scale = TensorProto()
        scale.CopyFrom(constants[node.input[1]])
        scale.name = f"{quantizer}/scale"
        graph.initializer.append(scale)
        (dequantize,) = readers[node.output[0]]
        dequantize.op_type, dequantize.domain = "DequantizeLinear", ""
        if node.input[0] in weights:
            transposes = readers[dequantize.output[0]]
            transposed = all(reader.op_type == "Transpose" for reader in transposes)
            # One for each quantizer: the exporter merges equal weights of different layers.
            stored = _e4m3(weights[node.input[0]], scale, transposed=transposed)
            stored.name = f"{quantizer}/e4m3"
            graph.initializer.append(stored)
            dequantize.input[:] = [stored.name, scale.name]
            gone.add(node.output[0])
            for transpose in transposes if transposed else []:
                gone.add(transpose.output[0])
                for reader in readers[transpose.output[0]]:
                    index = list(reader.input).index(transpose.output[0])
                    reader.input[index] = dequantize.output[0]
        else:
            node.op_type, node.domain = "QuantizeLinear", ""
            node.input[:] = [node.input[0], scale.name, _ZERO]
            node.attribute.append(helper.make_attribute("saturate", 1))
            dequantize.input[1] = scale.name

    graph.initializer.append(TensorProto(name=_ZERO, data_type=TensorProto.FLOAT8E4M3FN, raw_data=b"\0"))
    used = {name for node in graph.node if node.output[0] not in gone for name in node.input}
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if node.output[0] in gone or (node.op_type == "Constant" and node.output[0] not in used):
            del graph.node[index]
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in used:
            del graph.initializer[index]
    domains = [entry for entry in model.opset_import if entry.domain != "trt"]
    del model.opset_import[:]
    model.opset_import.extend(domains)
    # The shapes and types that the exporter wrote for the trt nodes (UINT8, unknown) are wrong now.
    del graph.value_info[:]


def _e4m3(weight: TensorProto, scale: TensorProto, *, transposed: bool) -> TensorProto:
    """A 16-bit weight as E4M3 in units of the scale, rounded once."""
    values = torch.from_numpy(numpy_helper.to_array(weight).astype(np.float32))
    values = values / float(numpy_helper.to_array(scale))
    if transposed:
        values = values.T
    stored = values.clamp(-E4M3_MAX, E4M3_MAX).contiguous().to(torch.float8_e4m3fn)
    return TensorProto(
        data_type=TensorProto.FLOAT8E4M3FN,
        dims=stored.shape,
        raw_data=stored.view(torch.uint8).numpy().tobytes(),
    )
