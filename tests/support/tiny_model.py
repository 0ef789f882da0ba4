"""A tiny model's ONNX artifacts, as the export stage writes them, and the engines command over them."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.__main__ import main
from mmdit.artifact import Layout, Manifest, whole
from mmdit.contract import COMPONENTS, Precision, Tensor, components
from mmdit.family import Family
from mmdit.shapes import shape_set

ROOT = Path(__file__).resolve().parents[2]


FAMILY = Family(
    name="tiny",
    variant="custom",
    layers=1,
    clip_l_dim=4,
    clip_l_pooled=3,
    clip_g_dim=6,
    clip_g_pooled=5,
    t5_dim=12,
    t5_tokens=7,
    context_dim=12,
    pooled_dim=8,
    latent_channels=4,
    patch_size=2,
    max_latent=32,
    default_size=128,
    vae_scaling_factor=1.5,
    vae_shift_factor=0.1,
    train_timesteps=1000,
    shift=3.0,
    steps=20,
    guidance_scale=4.5,
)


SIGNATURES = components(FAMILY, shape_set(FAMILY))


def tiny_graph(component: str, precision: Precision = Precision.FP16) -> onnx.ModelProto:
    """The least graph that keeps a component's contract."""
    signature = SIGNATURES[component]
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def node(kind: str, inputs: list[str], output: str, **attributes: object) -> None:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))

    def constant(name: str, value: object, dtype: type = np.float16) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    if signature.inputs[0].name == "input_ids":
        node("Cast", ["input_ids"], "ids", to=TensorProto.FLOAT16)  # [rows, tokens]
        node("Unsqueeze", ["ids", constant("last", [2], np.int64)], "column")  # [rows, tokens, 1]
        width = signature.outputs[0].dims[-1]
        node("MatMul", ["column", constant("to_hidden", np.ones((1, width)))], "hidden")
        if len(signature.outputs) == 2:
            node("ReduceMean", ["ids"], "mean", axes=[1], keepdims=1)  # [rows, 1]
            pooled = constant("to_pooled", np.ones((1, signature.outputs[1].dims[0])))
            node("MatMul", ["mean", pooled], "pooled")
    elif component == "mmdit" and precision is Precision.FP8:
        channels = FAMILY.latent_channels
        scale = constant("scale", 0.1)
        fp8 = TensorProto.FLOAT8E4M3FN
        constants.append(helper.make_tensor("zero", fp8, [], [0.0]))
        constants.append(helper.make_tensor("weight", fp8, [channels, channels], [1.0] * channels**2))
        node("Transpose", ["latent"], "tokens", perm=[0, 2, 3, 1])  # [rows, h, w, channels]
        node("QuantizeLinear", ["tokens", scale, "zero"], "quantized")
        node("DequantizeLinear", ["quantized", scale, "zero"], "dequantized")
        node("DequantizeLinear", ["weight", scale, "zero"], "dequantized_weight")
        node("MatMul", ["dequantized", "dequantized_weight"], "product")
        node("Transpose", ["product"], "velocity", perm=[0, 3, 1, 2])
    elif component == "mmdit":
        bias = constant("bias", np.ones((1, FAMILY.latent_channels, 1, 1)))
        node("Add", ["latent", bias], "velocity")
    else:
        kernel = constant("kernel", np.ones((FAMILY.latent_channels, 3, 8, 8)))
        node("ConvTranspose", ["latent", kernel], "image", strides=[8, 8])
    graph = helper.make_graph(
        nodes,
        component,
        [_value(tensor) for tensor in signature.inputs],
        [_value(tensor) for tensor in signature.outputs],
        constants,
    )
    opset = 17 if component in ("clip_l", "clip_g") else 20  # 18 moved ReduceMean's axes
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def _value(tensor: Tensor) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype.numpy))
    return helper.make_tensor_value_info(tensor.name, dtype, ["rows", *tensor.dims])


def save_source(
    build: Path,
    component: str,
    precision: Precision = Precision.FP16,
    *,
    model: onnx.ModelProto | None = None,
    checkpoint: str = "c0ffee",
    family: Family = FAMILY,
) -> None:
    """Write a component's ONNX artifact as the export stage does; the MMDiT's weights lie outside."""
    manifest = Manifest(
        kind="onnx",
        checkpoint=checkpoint,
        made_from={},
        settings={"family": family.model_dump(), "component": component},
        versions={},
    )
    with whole(Layout("tiny", build).onnx(component, precision), manifest) as partial:
        onnx.save_model(
            model or tiny_graph(component, precision),
            str(partial / "model.onnx"),
            save_as_external_data=component == "mmdit",
            location="model.onnx.data",
            size_threshold=0,
        )
        (partial / "layers.json").write_text("{}")


def save_tiny_model(build: Path) -> None:
    """All five components, and the MMDiT in FP8 too."""
    for component in COMPONENTS:
        save_source(build, component)
    save_source(build, "mmdit", Precision.FP8)


def engines(build: Path, *arguments: str) -> None:
    """Run the command in this process, for the CPU unless `arguments` name another target."""
    target_given = [] if "--target" in arguments else ["--target", "cpu"]
    main(["build", "--model", "tiny", "--build", str(build), *target_given, *arguments])


def engine_folder(build: Path, component: str, precision: Precision = Precision.FP16) -> Path:
    return Layout("tiny", build).engine("cpu", component, precision)
