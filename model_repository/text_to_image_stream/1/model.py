"""`text_to_image` step by step, with progress and previews.

Decoupled, over the same models; between two steps it looks whether the client has cancelled. (A
cancellation does not reach a decoupled model inside an ensemble, hence BLS.)
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import triton_python_backend_utils as pb_utils
from inside import triton
from inside.denoise import sigmas_for
from inside.limits import RequestError
from inside.schedule import Cancelled, Full


class TritonPythonModel:
    """See the contract for its tensors."""

    def initialize(self, args):
        self.model = triton.Model(args)
        self.family = self.model.settings["family"]
        self.max_streams = int(self.model.parameters["max_streams"])
        self.places = threading.Semaphore(self.max_streams)
        self.threads = ThreadPoolExecutor(self.max_streams, thread_name_prefix="stream")

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                inputs = {name: np.array(value) for name, value in self.model.inputs(request).items()}
                if not self.places.acquire(blocking=False):
                    raise Full(f"{self.max_streams} pictures are being streamed already: try again later")
            except Exception as error:
                self.end(sender, error)
            else:
                self.threads.submit(self.run, request, sender, inputs)
        return None

    def run(self, request, sender, inputs):
        try:
            self.stream(request, sender, **inputs)
        except Exception as error:
            self.end(sender, error)
        else:
            self.end(sender, None)
        finally:
            self.places.release()

    def end(self, sender, error):
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if error is None:
            sender.send(flags=final)
        else:
            sender.send(triton.error_response(error), flags=final)

    def stream(
        self, request, sender, *, progress_every=None, preview_every=None, preview_with_vae=None, **inputs
    ):
        every = 1 if progress_every is None else int(progress_every[0])
        if every < 1:
            raise RequestError(f"progress_every is {every}: expected 1 or more")
        steps = int(inputs.pop("steps", [self.family["steps"]])[0])
        text_names = ("prompt", "negative_prompt", "guidance_scale")
        text = triton.call(
            "text_encoder",
            {name: inputs[name] for name in text_names if name in inputs},
            ["context", "pooled", "truncated"],
        )
        segment = {name: values for name, values in inputs.items() if "prompt" not in name}
        segment |= {
            "context": text["context"],
            "pooled": text["pooled"],
            "steps": triton.one(steps, np.int32),
            "arrival": triton.one(time.monotonic_ns(), np.int64),  # each step keeps the stream's place
        }
        # A step at a time, whatever is reported, so that a client that cancels frees its place within one.
        step, sigmas, seed = 0, None, None
        while step == 0 or step < steps:  # at least once: the denoiser refuses what is wrong
            if sender.is_cancelled():
                raise Cancelled(f"cancelled by the client before step {step + 1} of {steps}")
            end = min(step + 1, steps)
            segment |= {"begin": triton.one(step, np.int32), "end": triton.one(end, np.int32)}
            state = triton.call("denoiser", segment, ["latents", "vae_latent", "used_seed"])
            if step == 0:
                seed = state["used_seed"]
                sigmas = sigmas_for(steps, self.family["shift"], self.family["train_timesteps"])
            segment["latents"] = state["latents"]
            step = end
            if step % every and step < steps:
                continue
            outputs = {
                "step": triton.one(step, np.int32),
                "steps": triton.one(steps, np.int32),
                "sigma": triton.one(sigmas[step], np.float32),
            }
            shown = preview_every is not None and preview_every[0] and step % preview_every[0] == 0
            if step == steps or shown:
                decoded = triton.call("vae_decoder", {"latent": state["vae_latent"]}, ["image"])["image"]
                image = triton.call("picture", {"decoded": decoded}, ["image"])["image"]
                outputs["image" if step == steps else "preview"] = image
            if step == steps:
                outputs |= {"used_seed": seed, "truncated": text["truncated"]}
            sender.send(triton.response(outputs, request))

    def finalize(self):
        self.threads.shutdown()
