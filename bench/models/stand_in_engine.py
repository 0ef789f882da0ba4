"""An engine that takes a fixed time: `base_ms`, and `row_ms` for each row; its answers are zeros.

A Triton model for the benchmarks, with the tensors of any component. What varies in an output's dims is the
latent's height and width, `scale` times.
"""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """It receives its inputs as every Python model does, and looks at the first one's shape alone."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        given = {name: float(each["string_value"]) for name, each in config["parameters"].items()}
        self.base, self.row, self.scale = given["base_ms"] / 1000, given["row_ms"] / 1000, int(given["scale"])
        self.input = config["input"][0]["name"]
        self.outputs = config["output"]

    def execute(self, requests):
        responses = []
        for request in requests:
            begin = time.perf_counter()
            rows, *dims = pb_utils.get_input_tensor_by_name(request, self.input).as_numpy().shape
            tensors = []
            for output in self.outputs:
                varying = iter(size * self.scale for size in dims[-2:])
                shape = [rows, *(int(dim) if int(dim) > 0 else next(varying) for dim in output["dims"])]
                tensors.append(pb_utils.Tensor(output["name"], np.zeros(shape, np.float16)))
            taken = time.perf_counter() - begin
            time.sleep(max(0.0, self.base + self.row * rows - taken))
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
