"""Prompt and negative prompt to the MMDiT's context, each from `prompt_encoder`, whose answers are cached.

Triton 2.51's response cache stores a failed answer as one without outputs, and answers with it from then on
(core, DynamicBatchScheduler::DelegateResponse); so it does an answer to a client that asked for some of the
outputs. Who finds such an answer asks with the next `generation`, another key of the cache: the same for all
servers that share one.
"""

import itertools

import numpy as np
from inside import triton
from inside.admission import check_guidance
from inside.denoise import rows_of
from inside.text import prompt_text

MOST_FAILURES = 100  # of one prompt, that lie in the cache; each costs a look


class TritonPythonModel:
    """See the contract for its tensors."""

    def initialize(self, args):
        self.model = triton.Model(args)
        self.default_guidance = self.model.settings["family"]["guidance_scale"]
        self.max_bytes = int(self.model.parameters["max_prompt_bytes"])

    def execute(self, requests):
        responses = []
        for request in requests:
            try:
                responses.append(triton.response(self.encode(**self.model.inputs(request)), request))
            except Exception as error:
                responses.append(triton.error_response(error, request))
        return responses

    def encode(self, prompt, negative_prompt=None, guidance_scale=None):
        scale = self.default_guidance if guidance_scale is None else float(guidance_scale[0])
        texts = {"prompt": prompt[0]}
        if rows_of(check_guidance(scale)) == 2:
            texts = {"negative_prompt": b"" if negative_prompt is None else negative_prompt[0]} | texts
        texts = {name: prompt_text(value, name, self.max_bytes) for name, value in texts.items()}
        rows = [self.row(text) for text in texts.values()]
        contexts, pooleds, truncated = zip(*rows, strict=True)
        return {
            "context": np.concatenate(contexts),
            "pooled": np.concatenate(pooleds),
            "truncated": np.logical_or.reduce(truncated),
        }

    def row(self, text):
        for generation in itertools.count():
            inputs = {
                "prompt": triton.one(text.encode(), np.object_),
                "generation": triton.one(generation, np.int64),
            }
            try:
                answer = triton.call("prompt_encoder", inputs, ["context", "pooled", "truncated"])
            except triton.NoAnswer:
                if generation == MOST_FAILURES:
                    raise
                continue
            return answer["context"], answer["pooled"], answer["truncated"]
