"""ModelOpt's traced quantizers → ONNX's own Q/DQ, with the weights stored as E4M3.

ModelOpt 0.47 traces each quantizer as `trt::TRT_FP8QuantizeLinear` and `trt::TRT_FP8DequantizeLinear` over
a 16-bit weight, with one scale for a whole tensor. Its own FP8QuantExporter is not used for the rest: it
would also quantize the patch embedding's weights and the softmax of attention whose other operands are
not quantized, has no scales for each channel, divides by the scale in FP16 before it rounds, and peaks
at eight times the weights' bytes of memory. `test_export_modelopt.py` notices when that changes.
"""

from collections import defaultdict
from collections.abc import Mapping

from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from export.weights import Graph, Weight

_QUANTIZE, _DEQUANTIZE = "TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear"
_ZERO = "fp8_zero_point"


def native_fp8(graph: Graph, weight_scales: Mapping[str, Tensor]) -> None:
    """Rewrite a traced graph in place.

    A quantized weight becomes an E4M3 initializer and a DequantizeLinear, its transpose folded in; a
    quantized activation a QuantizeLinear and a DequantizeLinear with a scalar scale. `weight_scales`:
    weight → its scale, a scalar or [output channels].
    """
    model = graph.model.graph
    initializers = {tensor.name for tensor in model.initializer}
    constants = {node.output[0]: node.attribute[0].t for node in model.node if node.op_type == "Constant"}
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.node:
        for name in node.input:
            readers[name].append(node)

    gone: set[str] = set()  # nodes by their first output
    for node in model.node:
        if node.op_type != _QUANTIZE:
            continue
        quantizer = node.name.rsplit("/", 1)[0]
        (dequantize,) = readers[node.output[0]]
        dequantize.op_type, dequantize.domain = "DequantizeLinear", ""
        if node.input[0] in initializers:
            scale = numpy_helper.from_array(weight_scales[node.input[0]].half().numpy(), f"{quantizer}/scale")
            transposes = readers[dequantize.output[0]]
            transposed = all(reader.op_type == "Transpose" for reader in transposes)
            dims = graph.tensors[node.input[0]].shape
            stored = TensorProto(
                name=f"{quantizer}/e4m3",
                data_type=TensorProto.FLOAT8E4M3FN,
                dims=reversed(dims) if transposed else dims,
            )
            graph.weights[stored.name] = Weight(node.input[0], transposed, weight_scales[node.input[0]])
            model.initializer.extend([scale, stored])
            dequantize.input[:] = [stored.name, scale.name]
            if scale.dims:
                dequantize.attribute.append(helper.make_attribute("axis", 1 if transposed else 0))
            gone.add(node.output[0])
            for transpose in transposes if transposed else []:
                gone.add(transpose.output[0])
                for reader in readers[transpose.output[0]]:
                    index = list(reader.input).index(transpose.output[0])
                    reader.input[index] = dequantize.output[0]
        else:
            scale = TensorProto()
            scale.CopyFrom(constants[node.input[1]])
            scale.name = f"{quantizer}/scale"
            model.initializer.append(scale)
            node.op_type, node.domain = "QuantizeLinear", ""
            node.input[:] = [node.input[0], scale.name, _ZERO]
            node.attribute.append(helper.make_attribute("saturate", 1))
            dequantize.input[1] = scale.name

    model.initializer.append(TensorProto(name=_ZERO, data_type=TensorProto.FLOAT8E4M3FN, raw_data=b"\0"))
    used = {name for node in model.node if node.output[0] not in gone for name in node.input}
    for index in reversed(range(len(model.node))):
        node = model.node[index]
        if node.output[0] in gone or (node.op_type == "Constant" and node.output[0] not in used):
            del model.node[index]
    for index in reversed(range(len(model.initializer))):
        name = model.initializer[index].name
        if name not in used:
            graph.weights.pop(name, None)
            del model.initializer[index]
    domains = [entry for entry in graph.model.opset_import if entry.domain != "trt"]
    del graph.model.opset_import[:]
    graph.model.opset_import.extend(domains)
    # The shapes and types that the exporter wrote for the trt nodes (UINT8, unknown) are wrong now.
    del model.value_info[:]
