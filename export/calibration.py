"""Calibration: the range of every quantized layer's input, over whole denoising trajectories.

Runs diffusers' own pipeline with guidance, so both the prompt's and the negative prompt's rows are
seen at every timestep of the schedule. The result is a small file of numbers; making the FP8 ONNX file
from it needs no forward pass.
"""

import json
from pathlib import Path
from typing import Any

import export.quiet  # noqa: F401  isort: skip
import modelopt.torch.quantization as mtq
import torch
from diffusers import StableDiffusion3Pipeline

from export.prompts import PROMPTS, CalibrationSettings, calibration_prompts
from export.quantization import input_quantizers, insert_quantizers
from mmdit.artifact import sha256
from mmdit.family import Family
from mmdit.progress import Progress

CALIBRATION_FILE = "calibration.json"


def write_calibration(family: Family, checkpoint: Path, settings: CalibrationSettings, folder: Path) -> None:
    """Run the calibration and write `calibration.json` into `folder`.

    Uses the GPU when there is one (FP16, parts moved to it as they are needed), else the CPU (FP32).
    """
    on_gpu = torch.cuda.is_available()
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        checkpoint, dtype=torch.float16 if on_gpu else torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    insert_quantizers(pipeline.transformer)
    if on_gpu:
        pipeline.enable_model_cpu_offload()
    prompts = calibration_prompts()[: settings.prompts]
    batches = [prompts[start : start + settings.batch] for start in range(0, len(prompts), settings.batch)]

    progress = Progress("calibrating", len(batches) * settings.steps, "steps of a batch")

    def after_step(*_: Any) -> dict[str, Any]:
        progress.advance()
        return {}  # the pipeline's own tensors, unchanged

    def run_trajectories(_: Any) -> None:
        with torch.no_grad(), progress:
            for index, batch in enumerate(batches):
                pipeline(
                    prompt=[prompt for prompt, _ in batch],
                    negative_prompt=[negative for _, negative in batch],
                    height=settings.size,
                    width=settings.size,
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance_scale,
                    max_sequence_length=family.t5_tokens,
                    generator=torch.Generator("cpu").manual_seed(settings.seed + index),
                    output_type="latent",
                    callback_on_step_end=after_step,
                )

    mtq.calibrate(pipeline.transformer, algorithm="max", forward_loop=run_trajectories)
    ranges = {
        layer: float(quantizer.amax) for layer, quantizer in input_quantizers(pipeline.transformer).items()
    }
    content = {
        "settings": settings.model_dump(),
        "prompts_sha256": sha256(PROMPTS),
        "timesteps": [float(timestep) for timestep in pipeline.scheduler.timesteps],
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "input_amax": ranges,
    }
    (folder / CALIBRATION_FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_ranges(folder: Path) -> dict[str, float]:
    """Layer → the largest magnitude of its input."""
    content = json.loads((folder / CALIBRATION_FILE).read_text())
    return {layer: float(amax) for layer, amax in content["input_amax"].items()}
