"""`text_to_image` step by step, with progress and previews.

Decoupled, over the same models; between two steps it looks whether the client has cancelled. (A
cancellation does not reach a decoupled model inside an ensemble, hence BLS.)
"""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import triton_python_backend_utils as pb_utils
from inside import triton
from inside.denoise import sigmas_for, vae_latent
from inside.errors import Cancelled, Expired, Full
from inside.limits import Limits
from inside.metrics import StreamMetrics
from inside.noise import noise_from_seed
from inside.preview import predicted, projected, read_projection
from inside.publisher import Publisher
from inside.reports import Reports, TimeOut, passed_on

TEXT = ("prompt", "negative_prompt", "guidance_scale")
# What `denoiser` takes of a request and does not change from step to step.
LASTING = ("seed", "guidance_scale", "guidance_start", "guidance_end", "height", "width")


class TritonPythonModel:
    """See the contract for its tensors."""

    def initialize(self, args):
        self.model = triton.Model(args)
        self.limits = Limits.from_settings(self.model.settings, max_steps=0)  # the denoiser's to refuse
        self.projection = read_projection(self.model.folder)
        self.max_streams = int(self.model.parameters["max_streams"])
        self.places = threading.Semaphore(self.max_streams)
        self.threads = ThreadPoolExecutor(self.max_streams, thread_name_prefix="stream")
        self.metrics = StreamMetrics()
        self.publisher = Publisher(self.metrics.read, pb_utils.MetricFamily)

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                inputs = {name: np.array(value) for name, value in self.model.inputs(request).items()}
                if not self.places.acquire(blocking=False):
                    raise Full(f"{self.max_streams} pictures are being streamed already: try again later")
            except Exception as error:
                self.end(request, sender, error)
            else:
                self.threads.submit(self.run, request, sender, inputs)
        return None

    def run(self, request, sender, inputs):
        try:
            self.stream(request, sender, inputs)
        except Exception as error:
            self.end(request, sender, error)
        else:
            self.end(request, sender, None)
        finally:
            self.places.release()

    def end(self, request, sender, error):
        self.metrics.ended(error)
        if error is None:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        else:
            triton.answer(request, sender, error)

    def stream(self, request, sender, inputs):
        reports = Reports.from_inputs(inputs)
        parameters = passed_on(request.parameters())
        time_out = TimeOut(request.timeout())
        steps = int(inputs.get("steps", [self.limits.default_steps])[0])
        text = triton.call(
            "text_encoder",
            {name: inputs[name] for name in TEXT if name in inputs},
            ["context", "pooled", "truncated"],
            timeout=request.timeout(),
            parameters=parameters,
        )
        constants = triton.tensors(
            {name: inputs[name] for name in LASTING if name in inputs}
            | {"context": text["context"], "pooled": text["pooled"]}
            | {"steps": triton.one(steps, np.int32)}
            | {"arrival": triton.one(time.monotonic_ns(), np.int64)}  # each step keeps the stream's place
        )
        before, latents, seed, sigmas = None, inputs.get("latents"), None, None
        # A step at a time, whatever is reported, so that a client that cancels frees its place within one.
        for step in range(max(steps, 1)):  # at least once: the denoiser refuses what is wrong
            part = {"begin": triton.one(step, np.int32), "end": triton.one(min(step + 1, steps), np.int32)}
            part |= {} if latents is None else {"latents": latents}
            state = None
            while state is None:  # it may be long before its turn comes
                if sender.is_cancelled():
                    raise Cancelled(f"cancelled by the client before step {step + 1} of {steps}")
                turn = time_out.turn(step + 1, steps)
                with contextlib.suppress(Expired):
                    state = triton.call(
                        "denoiser",
                        part,
                        ["latents", "used_seed"],
                        constants=constants,
                        timeout=turn,
                        parameters=parameters,
                    )
            before, latents, done = latents, state["latents"], step + 1
            if step == 0:
                seed = state["used_seed"]
                sigmas = sigmas_for(steps, self.limits.shift, self.limits.train_timesteps)
            if not reports.due(done, steps):
                continue
            outputs = {
                "step": triton.one(done, np.int32),
                "steps": triton.one(steps, np.int32),
                "sigma": triton.one(sigmas[done], np.float32),
            }
            if reports.has_preview(done, steps):
                if before is None:
                    before = noise_from_seed(int(seed[0]), latents.shape)
                clean = predicted(before, latents, sigmas[step], sigmas[done])
                outputs["preview"] = (
                    self.decoded(clean) if reports.with_vae else projected(clean, self.projection)
                )
            if done == steps:
                outputs |= {"image": self.decoded(latents), "used_seed": seed, "truncated": text["truncated"]}
            sender.send(triton.response(outputs, request))

    def decoded(self, latents):
        latent = vae_latent(latents, self.limits)
        decoded = triton.call("vae_decoder", {"latent": latent}, ["image"])["image"]
        return triton.call("picture", {"decoded": decoded}, ["image"])["image"]

    def finalize(self):
        self.threads.shutdown()
        self.publisher.close()
