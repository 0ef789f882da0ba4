"""Steps through the real step scheduler, and bare `exec()` calls of the same tensors, in turns.

A Triton model for the benchmarks. It lies beside a copy of `inside`, whose step models it drives, as the
denoiser does, from the scheduler's own threads.
"""

import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils
from inside import triton
from inside.denoise import DenoiseState, sigmas_for
from inside.request import Request
from inside.schedule import StepScheduler
from inside.step_models import StepModels
from inside.ticket import Ticket

CHANNELS, SIDE = 16, 128  # of the latent: 1024² pixels
CONTEXT, POOLED = (333, 4096), 2048  # of SD3.5 Large
ROWS = 2


class Watch:
    """The scheduler's observer: seconds in the engine, and of the scheduler's own work, by step."""

    def __init__(self):
        self.engine, self.host = [], []

    def called(self, call, rows, queued, engine, host):
        self.engine.append(engine)
        self.host.append(host)

    def ended(self, request, error):
        pass


class TritonPythonModel:
    """`rounds` × (`steps` steps, `steps` bare calls); answers with the milliseconds of each round's step."""

    def initialize(self, args):
        random = np.random.default_rng(0)
        self.latents = random.standard_normal((CHANNELS, SIDE, SIDE)).astype(np.float32)
        self.context = random.standard_normal((ROWS, *CONTEXT)).astype(np.float16)
        self.pooled = random.standard_normal((ROWS, POOLED)).astype(np.float16)
        self.watch = Watch()
        settings = triton.Model(args).settings
        engine = StepModels.from_settings(settings, call=triton.call, tensors=triton.tensors)
        self.scheduler = StepScheduler(engine, 8, observer=self.watch)
        self.thread = threading.Thread(target=self.scheduler.run)
        self.thread.start()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            answer = self.measure(request, sender.is_cancelled)
            sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def measure(self, request, is_cancelled):
        rounds, steps = (
            int(pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0])
            for name in ("rounds", "steps")
        )
        self.scheduled(steps, is_cancelled)
        self.bare(steps, new_latents=True)
        found = {"scheduled": [], "bare": [], "renewed": [], "engine": [], "host": []}
        for _ in range(rounds):
            self.watch.engine, self.watch.host = [], []
            found["scheduled"].append(self.scheduled(steps, is_cancelled))
            found["engine"].append(1000 * np.mean(self.watch.engine))
            found["host"].append(1000 * np.mean(self.watch.host))
            found["bare"].append(self.bare(steps, new_latents=False))
            found["renewed"].append(self.bare(steps, new_latents=True))
        return triton.response({name: np.array(values) for name, values in found.items()}, request)

    def scheduled(self, steps, is_cancelled):
        ended = threading.Event()
        failures = []

        def end(_, error):
            failures.append(error)
            ended.set()

        state = DenoiseState(
            latents=self.latents,
            conditions={"context": self.context, "pooled": self.pooled},
            sigmas=sigmas_for(steps, 3.0, 1000),
            guidance_scale=3.5,
            train_timesteps=1000,
            step=0,
            end=steps,
            guided=(0, steps),
        )
        # The scheduler asks meanwhile whether the request is cancelled: a round trip to the server.
        ticket = Ticket(is_cancelled=is_cancelled, on_end=end)
        begin = time.perf_counter()
        self.scheduler.submit(Request(state, max_rows=2, seed=0, ticket=ticket))
        ended.wait()
        taken = time.perf_counter() - begin
        if failures != [None]:
            raise failures[0]
        return 1000 * taken / steps

    def bare(self, steps, *, new_latents):
        """The tensors made once; or those of the latents at each call, as every loop's are new."""
        latent = np.repeat(self.latents[None].astype(np.float16), ROWS, axis=0)
        timestep = np.full((ROWS, 1), 500, np.float32)

        def request(latents):
            return pb_utils.InferenceRequest(
                model_name="mmdit",
                inputs=[*latents, *constants],
                requested_output_names=["velocity"],
                preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
            )

        constants = triton.tensors({"context": self.context, "pooled": self.pooled})
        made_once = request(triton.tensors({"latent": latent, "timestep": timestep}))
        begin = time.perf_counter()
        for _ in range(steps):
            if new_latents:
                answer = request(triton.tensors({"latent": latent, "timestep": timestep})).exec()
            else:
                answer = made_once.exec()
        taken = time.perf_counter() - begin
        if answer.has_error():
            raise RuntimeError(answer.error().message())
        return 1000 * taken / steps

    def finalize(self):
        self.scheduler.close()
        self.thread.join()
