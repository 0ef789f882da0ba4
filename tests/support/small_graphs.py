"""Small ONNX graphs, one property each."""

from onnx import ModelProto, TensorProto, helper

FP8 = TensorProto.FLOAT8E4M3FN
FP16 = TensorProto.FLOAT16
FP32 = TensorProto.FLOAT


def weight(name: str, dims: list[int], data_type: int = FP16) -> TensorProto:
    """A weight without data, as in a file whose data lies beside it."""
    return TensorProto(name=name, dims=dims, data_type=data_type, data_location=TensorProto.EXTERNAL)


def scalar(name: str, value: float = 1.0, data_type: int = FP16) -> TensorProto:
    """A constant number."""
    return helper.make_tensor(name, data_type, [], [value])


def model(nodes: list, inputs: dict[str, list], initializers: list = (), data_type: int = FP16) -> ModelProto:
    """A graph whose output is the last node's; `inputs`: name → dims, of `data_type`."""
    values = [helper.make_tensor_value_info(name, data_type, dims) for name, dims in inputs.items()]
    output = helper.make_tensor_value_info(nodes[-1].output[0], data_type, None)
    graph = helper.make_graph(nodes, "small", values, [output], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
