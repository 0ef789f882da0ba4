"""Calibration: the range of every quantized tensor, over whole denoising trajectories.

The result is `calibration.json`, a small file of numbers; making the FP8 ONNX file from it needs no forward
pass. An interrupted calibration goes on after its last finished batch.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import export.quiet  # noqa: F401  isort: skip
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from export.modules import load_fp32, load_module
from export.policy import AttentionPrecision, Rule
from export.prompts import CalibrationSettings
from export.quantization import input_quantizers, insert_quantizers
from export.remedies import Remedies, apply_remedies
from export.trajectories import Batch, Denoiser, batches, denoised, device
from mmdit.artifact import versions
from mmdit.code import code_of
from mmdit.errors import QuantizationError, first_line
from mmdit.family import Family

CALIBRATION_FILE = "calibration.json"
_TOOLS = ("torch", "diffusers", "transformers", "nvidia-modelopt")


class Calibration(BaseModel):
    """The ranges, and everything that they depend on.

    `amax`: quantizer → the largest magnitude that it saw (a layer's name stands for its input, attention's
    operands are `<attention>.q`, `.k`, `.v`). `checkpoint` and `policy` are SHA-256 of the checkpoint's
    files and of the set of quantizers. `rows` counts the transformer's rows: prompts' and negative
    prompts', and in each tenth of the timesteps from 0 to 1000.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    policy: str
    prompts_sha256: str
    t5_tokens: int
    settings: CalibrationSettings
    timesteps: list[float]
    rows: dict[str, Any]
    device: str
    versions: dict[str, str]
    amax: dict[str, float]


def write_calibration(
    family: Family,
    checkpoint: Path,
    made_for: dict[str, Any],
    decisions: dict[str, Rule],
    attention: AttentionPrecision,
    remedies: Remedies,
    settings: CalibrationSettings,
    folder: Path,
) -> None:
    """Run the calibration and write `calibration.json` into `folder`; ranges so far lie beside it meanwhile.

    `made_for` are the hashes and settings that `read_calibration` compares. Uses the GPU when there is one
    (FP16), else the CPU (FP32). Raises QuantizationError naming a tensor that is not finite.
    """
    identity: dict[str, Any] = {
        **made_for,
        "settings": settings.model_dump(mode="json"),
        "device": torch.cuda.get_device_name() if device().type == "cuda" else "CPU",
        "versions": versions(*_TOOLS),
    }
    state = folder.parent / ".calibration.json"
    run_by = {"remedies": remedies.model_dump(mode="json"), "code": code_of(write_calibration)}
    done, amax = _unfinished(state, identity | run_by)
    work = batches(family, checkpoint, settings)
    on_gpu = device().type == "cuda"
    module = load_module("mmdit", checkpoint, torch.float16) if on_gpu else load_fp32("mmdit", checkpoint)
    apply_remedies("mmdit", module, remedies)
    transformer = module.model
    denoiser = Denoiser(checkpoint, transformer, settings.guidance_scale)
    _say_cost(denoiser, work[done:])
    insert_quantizers(transformer, decisions, attention)
    quantizers = input_quantizers(transformer)
    for part in transformer.modules():  # weights' ranges are known, and would be measured anew in every call
        if isinstance(part, TensorQuantizer) and part not in quantizers.values():
            part.disable()
    for name, quantizer in quantizers.items():
        quantizer._calibrator.collect = _finite(name, quantizer._calibrator.collect)

    def run(_: Any) -> None:
        for count, _latents in enumerate(denoised(denoiser, work[done:], "calibrating"), start=done + 1):
            for name, quantizer in quantizers.items():
                seen = quantizer._calibrator.compute_amax()
                if seen is not None:
                    amax[name] = max(amax.get(name, 0.0), float(seen))
            partial = state.with_suffix(".partial")
            partial.write_text(json.dumps({"identity": identity | run_by, "batches": count, "amax": amax}))
            partial.replace(state)

    mtq.calibrate(transformer, algorithm="max", forward_loop=run)
    visited = [
        timestep for batch in work for timestep in batch.timesteps for _ in batch.texts["prompt_embeds"]
    ]
    prompts = sum(len(batch.texts["prompt_embeds"]) * len(batch.timesteps) for batch in work)
    calibration = Calibration(
        **identity,
        timesteps=sorted({round(timestep, 3) for timestep in visited}),
        rows={
            "prompts": prompts,
            "negative prompts": prompts,
            "by timestep": {
                f"{low}-{low + 100}": 2 * sum(low < timestep <= low + 100 for timestep in visited)
                for low in range(0, 1000, 100)
            },
        },
        amax={name: amax[name] for name in sorted(quantizers) if name in amax},
    )
    (folder / CALIBRATION_FILE).write_text(calibration.model_dump_json(indent=2) + "\n")
    state.unlink()


def read_calibration(path: Path, made_for: dict[str, Any]) -> Calibration:
    """A saved calibration, checked to be of this checkpoint, policy, prompt set and length of T5's input.

    Raises QuantizationError with both hashes when it is of another, or when it cannot be read.
    """
    try:
        calibration = Calibration.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizationError(f"the calibration {path} cannot be read ({first_line(error)})") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"])) or "the file"
        raise QuantizationError(
            f"the calibration {path} is damaged: {place}: {wrong['msg']}; calibrate again"
        ) from None
    for field, expected in made_for.items():
        found = getattr(calibration, field)
        if found != expected:
            names = {"prompts_sha256": "set of prompts", "t5_tokens": "length of T5's input"}
            what = names.get(field, field)
            raise QuantizationError(
                f"the calibration {path} was made for another {what}: {found}, expected {expected}; "
                f"calibrate again, or give the calibration of this {what}"
            )
    return calibration


def _unfinished(state: Path, identity: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """The batches that an interrupted calibration of the same kind finished, and its ranges so far."""
    try:
        found = json.loads(state.read_text())
        if found["identity"] == identity:
            print(f"calibration: goes on after {found['batches']} batches of an interrupted run", flush=True)
            return found["batches"], found["amax"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, {}


def _say_cost(denoiser: Denoiser, work: list[Batch]) -> None:
    """Print what is to be run, and how long that takes by the time of one call."""
    calls = sum(len(batch.timesteps) for batch in work)
    if not calls:
        return
    start = time.monotonic()
    denoiser(replace(work[0], timesteps=work[0].timesteps[:1]))
    seconds = calls * (time.monotonic() - start)
    rows = 2 * len(work[0].texts["prompt_embeds"])
    sizes = ", ".join(dict.fromkeys(f"{height}x{width}" for height, width in (batch.size for batch in work)))
    print(
        f"calibration: {len(work)} batches × {len(work[0].timesteps)} steps = {calls} calls of the MMDiT, "
        f"{rows} rows each (prompts and negative prompts) at {sizes}: about {seconds:.0f} s on "
        f"{device().type.upper()}",
        flush=True,
    )


def _finite(name: str, collect: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A calibrator's `collect` that names the tensor which is not finite."""

    def collected(values: Tensor) -> None:
        if not torch.isfinite(values).all():
            raise QuantizationError(
                f"{name}: the calibration met values that are not finite there: is the checkpoint whole?"
            )
        collect(values)

    return collected
