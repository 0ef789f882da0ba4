"""Checkpoint → one FP16 ONNX file per component, with the contract's names and dynamic dims."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from export.modules import explicit_attention, load_module
from mmdit.contract import Dtype, Signature, Tensor, dims_at, dims_vary
from mmdit.errors import CheckpointError, EngineError
from mmdit.progress import Progress

# Q/DQ with FP16 scales needs 19; 20 has Gelu. TorchScript's exporter is right at any size; torch's newer
# one is wrong at odd numbers of tokens (torch 2.13).
OPSET = 20
EXTERNAL_DATA_BYTES = 2**31 - 2**24  # protobuf ends at 2 GiB; leave room for the graph itself
ONNX_FILE = "model.onnx"
_TRACED_ROWS = 2
_TRACED_SIZE = (128, 160)  # pixels; any size would do, and none is special


def write_onnx(component: str, signature: Signature, checkpoint: Path, folder: Path) -> None:
    """Trace a component's module in FP16 and write `model.onnx` into `folder`.

    Raises CheckpointError when weights are missing or not finite in FP16.
    """
    with Progress(f"onnx {component}", total=3, unit="of load, trace, save") as progress:
        module = load_module(component, checkpoint, torch.float16)
        check_finite(component, module)
        progress.advance()
        model = traced(module, signature, folder)
        progress.advance()
        save_onnx(model, folder / ONNX_FILE)


def check_finite(component: str, module: nn.Module) -> None:
    """Raise CheckpointError naming the first weight that FP16 cannot hold."""
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight).all():
            raise CheckpointError(
                f"{component}: {name} has values that are not finite in FP16 (largest is 65504)"
            )


def traced(module: nn.Module, signature: Signature, folder: Path) -> onnx.ModelProto:
    """A module's graph, traced with TorchScript's exporter; `folder` holds its files meanwhile."""
    path = folder / ONNX_FILE
    tensors = (*signature.inputs, *signature.outputs)
    varying = dims_vary(signature)
    with warnings.catch_warnings(), torch.no_grad(), explicit_attention():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Constant folding", category=UserWarning)
        # CLIP's pooling; its indices are never negative
        warnings.filterwarnings("ignore", message="Exporting aten::index operator", category=UserWarning)
        torch.onnx.export(
            module,
            example_inputs(signature, _TRACED_ROWS, _TRACED_SIZE if varying else (0, 0)),
            str(path),
            input_names=[tensor.name for tensor in signature.inputs],
            output_names=[tensor.name for tensor in signature.outputs],
            dynamic_axes={tensor.name: _dynamic_axes(tensor) for tensor in tensors},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(path)
    for value, tensor in zip((*model.graph.input, *model.graph.output), tensors, strict=True):
        # The exporter leaves names of its own where it could not follow a dim.
        for dim, known in zip(value.type.tensor_type.shape.dim, ("rows", *tensor.dims), strict=True):
            if isinstance(known, int):
                dim.dim_value = known
            else:
                dim.dim_param = known
    for file in folder.iterdir():  # past 2 GB the exporter writes a file for each tensor
        file.unlink()
    return model


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, its weights in one file beside it when they pass protobuf's limit; check it.

    Raises EngineError when the checker refuses the file.
    """
    external = sum(len(weight.raw_data) for weight in model.graph.initializer) > EXTERNAL_DATA_BYTES
    onnx.save_model(
        model,
        path,
        save_as_external_data=external,
        all_tensors_to_one_file=True,
        location=f"{path.name}.data",
        size_threshold=1024,
    )
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"{path} is not a valid ONNX model: {error}") from None


def example_inputs(
    signature: Signature, rows: int, size: tuple[int, int], seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Random inputs of a component for `rows` rows at `size` = (height, width) in pixels.

    Ids are below 64, which every vocabulary has; timesteps lie in [0, 1000); the rest is normal.
    """
    random = np.random.default_rng(seed)
    inputs = []
    for tensor in signature.inputs:
        shape = (rows, *dims_at(tensor, size))
        if tensor.dtype is Dtype.INT64:
            values: Any = random.integers(0, 64, shape)
        elif tensor.name == "timestep":
            values = random.uniform(0, 1000, shape)
        else:
            values = random.standard_normal(shape)
        inputs.append(torch.from_numpy(values.astype(tensor.dtype.numpy)))
    return tuple(inputs)


def _dynamic_axes(tensor: Tensor) -> dict[int, str]:
    names = {0: "rows"}
    return names | {axis: dim for axis, dim in enumerate(tensor.dims, start=1) if isinstance(dim, str)}
