"""Prompt and negative prompt to the MMDiT's context, each from `prompt_encoder`, whose answers are cached.

Triton 2.51's response cache stores a failed answer as one without outputs, and answers with it from then on
(core, DynamicBatchScheduler::DelegateResponse); so it does an answer to a client that asked for some of the
outputs. Who finds such an answer asks with the next `generation`, another key of the cache: the same for all
servers that share one.

`execute` admits requests and returns; one thread encodes them.
"""

import itertools
import threading
import time
from functools import partial

import numpy as np
import triton_python_backend_utils as pb_utils
from inside import triton
from inside.admission import check_guidance, deadline_in, priority_of
from inside.bounded_queue import BoundedQueue, Job
from inside.denoise import rows_of
from inside.metrics import TextMetrics
from inside.publisher import Publisher
from inside.text import prompt_text

MOST_FAILURES = 100  # of one prompt, that lie in the cache; each costs a look


class TritonPythonModel:
    """See the contract for its tensors."""

    def initialize(self, args):
        self.model = triton.Model(args)
        self.default_guidance = self.model.settings["family"]["guidance_scale"]
        policy = {name: int(value) for name, value in self.model.parameters.items()}
        self.max_bytes = policy["max_prompt_bytes"]
        self.default_priority = priority_of("{}", policy["default_priority_level"])
        self.queue = BoundedQueue("text_encoder", policy["max_requests"])
        self.metrics = TextMetrics()
        self.publisher = Publisher(lambda: self.metrics.read(len(self.queue)), pb_utils.MetricFamily)
        self.thread = threading.Thread(target=self.queue.run, name="text")
        self.thread.start()

    def execute(self, requests):
        for request in requests:
            answer = partial(self.answer, request, request.get_response_sender(), time.monotonic())
            try:
                texts = self.texts(**self.model.inputs(request))
                deadline = deadline_in(request.timeout())
                priority = priority_of(request.parameters(), self.default_priority)
                self.queue.submit(Job(partial(self.encode, texts, deadline), answer, priority, deadline))
            except Exception as error:
                answer(error)
        return None

    def texts(self, prompt, negative_prompt=None, guidance_scale=None):
        """What is to be encoded, a row each."""
        scale = self.default_guidance if guidance_scale is None else float(guidance_scale[0])
        texts = {"prompt": prompt[0]}
        if rows_of(check_guidance(scale)) == 2:
            texts = {"negative_prompt": b"" if negative_prompt is None else negative_prompt[0]} | texts
        return [prompt_text(value, name, self.max_bytes) for name, value in texts.items()]

    def encode(self, texts, deadline):
        contexts, pooleds, truncated = zip(*map(self.row, texts), strict=True)
        return {
            "context": np.concatenate(contexts),
            "pooled": np.concatenate(pooleds),
            "truncated": np.logical_or.reduce(truncated),
            "deadline": triton.one(deadline, np.int64),
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

    def answer(self, request, sender, begin, result):
        error = triton.answer(request, sender, result)
        self.metrics.ended(error, time.monotonic() - begin)

    def finalize(self):
        self.queue.close()
        self.thread.join()
        self.publisher.close()
