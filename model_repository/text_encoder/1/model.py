"""Prompt and negative prompt to the MMDiT's context; each prompt is one row of each encoder, so that
Triton's response cache holds single prompts."""

import numpy as np
from inside import triton
from inside.admission import check_guidance
from inside.denoise import rows_of
from inside.limits import RequestError
from inside.text import PromptTokenizers, join, prompt_text


class TritonPythonModel:
    """See the contract for its tensors."""

    def initialize(self, args):
        self.model = triton.Model(args)
        self.encoders = self.model.settings["encoders"]  # encoder → its outputs
        self.tokenizers = PromptTokenizers(self.model.folder / "tokenizers_json", tuple(self.encoders))
        self.width = self.model.settings["family"]["context_dim"]
        self.default_guidance = self.model.settings["family"]["guidance_scale"]
        self.max_bytes = int(self.model.parameters["max_prompt_bytes"])

    def execute(self, requests):
        responses = []
        for request in requests:
            try:
                responses.append(triton.response(self.encode(**self.model.inputs(request)), request))
            except Exception as error:
                responses.append(triton.error_response(error))
        return responses

    def encode(self, prompt, negative_prompt=None, guidance_scale=None):
        scale = self.default_guidance if guidance_scale is None else float(guidance_scale[0])
        texts = {"prompt": prompt[0]}
        if rows_of(check_guidance(scale)) == 2:
            texts = {"negative_prompt": b"" if negative_prompt is None else negative_prompt[0]} | texts
        contexts, pooleds, any_truncated = [], [], False
        for name, value in texts.items():
            try:
                text = prompt_text(value, name, self.max_bytes)
            except ValueError as error:
                raise RequestError(str(error)) from None
            ids, truncated = self.tokenizers(text)
            any_truncated |= truncated
            answers = {
                encoder: triton.call(encoder, {"input_ids": ids[encoder]}, outputs)
                for encoder, outputs in self.encoders.items()
            }
            hidden = {encoder: answer["hidden"] for encoder, answer in answers.items()}
            pooled = {encoder: answer["pooled"] for encoder, answer in answers.items() if "pooled" in answer}
            context_row, pooled_row = join(hidden, pooled, self.width)
            contexts.append(context_row)
            pooleds.append(pooled_row)
        return {
            "context": np.stack(contexts),
            "pooled": np.stack(pooleds),
            "truncated": triton.one(any_truncated, np.bool_),
        }
