"""The VAE's output to pixels."""

from inside import triton
from inside.pixels import pixels_from


class TritonPythonModel:
    """See the contract for its tensors."""

    def initialize(self, args):
        self.model = triton.Model(args)

    def execute(self, requests):
        responses = []
        for request in requests:
            try:
                image = pixels_from(self.model.inputs(request)["decoded"])
                responses.append(triton.response({"image": image}, request))
            except Exception as error:
                responses.append(triton.error_response(error, request))
        return responses
