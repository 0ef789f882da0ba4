"""`text_to_image` in segments of steps, with progress and previews after each.

Decoupled, over the same models; between two segments it looks whether the client has cancelled. (A
cancellation does not reach a decoupled model inside an ensemble, hence BLS.)
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import triton_python_backend_utils as pb_utils
from inside import triton
from inside.denoise import RequestError, sigmas_for
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
            inputs = {name: np.array(value) for name, value in self.model.inputs(request).items()}
            if self.places.acquire(blocking=False):
                self.threads.submit(self.run, sender, inputs)
            else:
                full = Full(f"{self.max_streams} pictures are being streamed already: try again later")
                self.end(sender, full)
        return None

    def run(self, sender, inputs):
        try:
            self.stream(sender, **inputs)
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

    def stream(self, sender, *, progress_every=None, preview=None, **inputs):
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
        }
        begin = end = 0
        seed = sigmas = None
        while begin == 0 or begin < steps:  # at least once: the denoiser refuses what is wrong
            if sender.is_cancelled():
                raise Cancelled(f"cancelled by the client before step {begin + 1} of {steps}")
            end = min(begin + every, steps)
            segment |= {"begin": triton.one(begin, np.int32), "end": triton.one(end, np.int32)}
            state = triton.call("denoiser", segment, ["latents", "vae_latent", "used_seed"])
            if begin == 0:
                seed = state["used_seed"]
                sigmas = sigmas_for(steps, self.family["shift"], self.family["train_timesteps"])
            segment["latents"] = state["latents"]
            outputs = {
                "step": triton.one(end, np.int32),
                "steps": triton.one(steps, np.int32),
                "sigma": triton.one(sigmas[end], np.float32),
            }
            if end == steps or (preview is not None and preview[0]):
                decoded = triton.call("vae_decoder", {"latent": state["vae_latent"]}, ["image"])["image"]
                outputs |= triton.call("picture", {"decoded": decoded}, ["image"])
            if end == steps:
                outputs |= {"used_seed": seed, "truncated": text["truncated"]}
            sender.send(triton.response(outputs))
            begin = end

    def finalize(self):
        self.threads.shutdown()
