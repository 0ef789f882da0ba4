"""The denoise loop: `execute` admits requests and returns; one thread steps through them all."""

import threading
from functools import partial

import numpy as np
import triton_python_backend_utils as pb_utils
from inside import triton
from inside.admission import deadline_in, priority_of, request_from
from inside.denoise import vae_latent
from inside.errors import Full
from inside.limits import Limits
from inside.metrics import LoopMetrics
from inside.publisher import Publisher
from inside.schedule import StepScheduler
from inside.step_models import StepModels


class TritonPythonModel:
    """See the contract for its tensors."""

    def initialize(self, args):
        self.model = triton.Model(args)
        policy = {name: int(value) for name, value in self.model.parameters.items()}
        self.limits = Limits.from_settings(self.model.settings, policy["max_steps"])
        self.default_priority = priority_of("{}", policy["default_priority_level"])
        self.metrics = LoopMetrics(self.limits)
        engine = StepModels.from_settings(self.model.settings, call=triton.call, tensors=triton.tensors)
        self.scheduler = StepScheduler(engine, policy["max_requests"], observer=self.metrics)
        self.publisher = Publisher(lambda: self.metrics.read(self.scheduler.held()), pb_utils.MetricFamily)
        self.thread = threading.Thread(target=self.scheduler.run, name="steps")
        self.thread.start()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                denoising = request_from(self.model.inputs(request), self.limits)
                ticket = denoising.ticket
                ticket.deadline = ticket.deadline or deadline_in(request.timeout())
                ticket.priority = priority_of(request.parameters(), self.default_priority)
                if not ticket.streamed:  # the stream looks after its own client
                    ticket.is_cancelled = sender.is_cancelled
                ticket.on_end = partial(self.answer, request, sender)
                self.scheduler.submit(denoising)
            except Exception as error:
                if not isinstance(error, Full):  # of which the scheduler has told
                    self.metrics.rejected(error)
                triton.answer(request, sender, error)
        return None

    def answer(self, request, sender, denoising, error):
        try:
            result = error or self.outputs(denoising)
        except Exception as failure:
            result = failure
        triton.answer(request, sender, result)

    def outputs(self, denoising):
        return {
            "latents": denoising.state.latents,
            "vae_latent": vae_latent(denoising.state.latents, self.limits),
            "used_seed": triton.one(denoising.seed, np.int64),
        }

    def finalize(self):
        self.scheduler.close()
        self.thread.join()
        self.publisher.close()
