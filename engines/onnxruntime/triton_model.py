"""An engine on ONNX Runtime's CPU provider; the packager writes it as an engine's `model.py` where
TensorRT is not there."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The tensors are those of `model.onnx`, rows first."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / "settings.json").read_text())
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(
            onnxruntime.GraphOptimizationLevel, settings["graph_optimization_level"]
        )
        # Several engines share the cores: an idle one must not spin on them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        responses = []
        for request in requests:
            try:
                inputs = {
                    name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs
                }
                answers = self.session.run(self.outputs, inputs)
                tensors = [
                    pb_utils.Tensor(name, values)
                    for name, values in zip(self.outputs, answers, strict=True)
                    if name in request.requested_output_names()
                ]
                responses.append(pb_utils.InferenceResponse(tensors))
            except Exception as error:
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))))
        return responses
