"""An engine that takes a fixed time: `base_ms`, and `row_ms` for each row; its velocity is zero.

A Triton model for the benchmarks, with the `mmdit` model's tensors.
"""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """It receives its inputs as every Python model does, and looks at the latent alone."""

    def initialize(self, args):
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self.base, self.row = (
            float(parameters[name]["string_value"]) / 1000 for name in ("base_ms", "row_ms")
        )

    def execute(self, requests):
        responses = []
        for request in requests:
            begin = time.perf_counter()
            latent = pb_utils.get_input_tensor_by_name(request, "latent").as_numpy()
            velocity = pb_utils.Tensor("velocity", np.zeros_like(latent))
            taken = time.perf_counter() - begin
            time.sleep(max(0.0, self.base + self.row * len(latent) - taken))
            responses.append(pb_utils.InferenceResponse([velocity]))
        return responses
