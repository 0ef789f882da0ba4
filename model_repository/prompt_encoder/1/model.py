"""One prompt to its rows of the MMDiT's context: the model whose answers Triton's response cache holds.

`generation` is read by nobody: it is there for the cache, whose key are the inputs.
"""

import numpy as np
from inside import triton
from inside.text import PromptTokenizers, join, prompt_text


class TritonPythonModel:
    """See the contract for its tensors."""

    def initialize(self, args):
        self.model = triton.Model(args)
        self.encoders = self.model.settings["encoders"]  # encoder → its outputs
        self.tokenizers = PromptTokenizers(self.model.folder / "tokenizers_json", tuple(self.encoders))
        self.width = self.model.settings["family"]["context_dim"]
        self.max_bytes = int(self.model.parameters["max_prompt_bytes"])

    def execute(self, requests):
        responses = []
        for request in requests:
            try:
                prompt = self.model.inputs(request)["prompt"][0]
                text = prompt_text(prompt, "prompt", self.max_bytes)
                responses.append(triton.response(self.encode(text), request))
            except Exception as error:
                responses.append(triton.error_response(error, request))
        return responses

    def encode(self, prompt):
        ids, truncated = self.tokenizers(prompt)
        answers = {
            encoder: triton.call(encoder, {"input_ids": ids[encoder]}, outputs)
            for encoder, outputs in self.encoders.items()
        }
        hidden = {encoder: answer["hidden"] for encoder, answer in answers.items()}
        pooled = {encoder: answer["pooled"] for encoder, answer in answers.items() if "pooled" in answer}
        context_row, pooled_row = join(hidden, pooled, self.width)
        return {
            "context": context_row[None],
            "pooled": pooled_row[None],
            "truncated": triton.one(truncated, np.bool_),
        }
