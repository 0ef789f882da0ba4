"""The overflow scan: which activations of an FP32 run FP16 cannot hold, and what is done about them.

Runs the calibration prompts through each component in FP32, one component in memory at a time, as the
graph will compute it, and writes `activations.json`: every tensor's magnitude, what overflows, what sinks
into subnormals, and the remedies (`export.remedies`).
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import export.quiet  # noqa: F401  isort: skip
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5TokenizerFast

from export.modules import explicit_attention, fp32_linears, load_fp32
from export.onnx_from_checkpoint import check_finite
from export.overflow import LARGEST, SAFETY, Activation, Scan, remedies_from_scan, scan
from export.prompts import PROMPTS, CalibrationSettings, calibration_prompts
from export.recorder import Recorder
from export.remedies import Remedies
from export.trajectories import Batch, Denoiser, denoised, device, timesteps
from mmdit.artifact import sha256, versions
from mmdit.contract import COMPONENTS, TEXT_ENCODERS
from mmdit.errors import ArtifactError, first_line
from mmdit.family import CLIP_TOKENS, TOKENIZERS, Family
from mmdit.progress import Progress

ACTIVATIONS_FILE = "activations.json"


def write_scan(family: Family, checkpoint: Path, settings: CalibrationSettings, folder: Path) -> None:
    """Scan all components, write `activations.json` into `folder`, print what was found."""
    scans: dict[str, Scan] = {}

    def scanned(component: str, run: Callable[[nn.Module], list[Tensor]]) -> list[Tensor]:
        scans[component], outputs = scan_component(component, checkpoint, run)
        return outputs

    pairs = calibration_prompts()[: settings.prompts]
    texts = [text for pair in pairs for text in pair]
    encoded = {}
    for component in TEXT_ENCODERS:
        ids = _input_ids(component, checkpoint, texts, family).split(settings.batch)
        encoded[component] = scanned(component, partial(_encoded, component, ids))
    work = _batches(encoded, settings)
    latents = scanned(
        "mmdit",
        lambda module: list(
            denoised(Denoiser(checkpoint, module.model, settings.guidance_scale), work, "scan mmdit")
        ),
    )
    scanned("vae_decoder", lambda module: _decoded(family, module, latents))

    report = {component: _report(scans[component]) for component in COMPONENTS}
    content = {
        "settings": settings.model_dump(),
        "prompts_sha256": sha256(PROMPTS),
        "timesteps": [batch.timesteps for batch in work],
        "device": torch.cuda.get_device_name() if device().type == "cuda" else "CPU",
        "versions": versions("torch", "diffusers", "transformers"),
        "largest_fp16": LARGEST,
        "safety_factor": SAFETY,
        "components": report,
    }
    (folder / ACTIVATIONS_FILE).write_text(json.dumps(content, indent=1) + "\n")
    for component in COMPONENTS:
        print(_summary(component, scans[component]), flush=True)


def scan_component(component: str, checkpoint: Path, run: Callable[[nn.Module], Any]) -> tuple[Scan, Any]:
    """Scan what `run` makes a component's FP32 module compute; with what `run` returned."""
    module = load_fp32(component, checkpoint).to(device())
    check_finite(component, module)
    with torch.no_grad(), explicit_attention(), fp32_linears(), Recorder(module) as recorder:
        outputs = run(module)
    return scan(component, module, recorder.recording), outputs


def read_remedies(folder: Path) -> dict[str, Remedies]:
    """Component → its remedies, from a scan's folder. Raises ArtifactError when the file is no scan."""
    path = folder / ACTIVATIONS_FILE
    try:
        components = json.loads(path.read_text())["components"]
        return {component: Remedies(**components[component]["remedies"]) for component in COMPONENTS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is no overflow scan ({first_line(error)}): run the scan again") from None


def _input_ids(component: str, checkpoint: Path, texts: list[str], family: Family) -> Tensor:
    """`texts` as ids [texts, tokens], as the pipeline pads them."""
    of_t5 = component == "t5"
    tokenizer = (T5TokenizerFast if of_t5 else CLIPTokenizer).from_pretrained(
        checkpoint / TOKENIZERS[component]
    )
    ids: Tensor = tokenizer(
        texts,
        padding="max_length",
        max_length=family.t5_tokens if of_t5 else CLIP_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def _encoded(component: str, batches: tuple[Tensor, ...], module: nn.Module) -> list[Tensor]:
    """An encoder's outputs, the rows of all batches joined."""
    outputs = []
    with Progress(f"scan {component}", len(batches), "batches of prompts") as progress:
        for ids in batches:
            output = module(ids.to(device()))
            outputs.append(output if isinstance(output, tuple) else (output,))
            progress.advance()
    return [torch.cat(tensors).cpu() for tensors in zip(*outputs, strict=True)]


def _batches(encoded: dict[str, list[Tensor]], settings: CalibrationSettings) -> list[Batch]:
    """The encoders' answers, to prompts and negative prompts in turn, as the pipeline joins them."""
    (hidden_l, pooled_l), (hidden_g, pooled_g), (hidden_t5,) = (encoded[name] for name in TEXT_ENCODERS)
    clip = torch.cat([hidden_l, hidden_g], -1)
    clip = nn.functional.pad(clip, (0, hidden_t5.shape[-1] - clip.shape[-1]))
    context = torch.cat([clip, hidden_t5], -2)  # [texts, 77 + S, D]
    pooled = torch.cat([pooled_l, pooled_g], -1)
    starts = range(0, len(context), 2 * settings.batch)
    work = []
    for index, start in enumerate(starts):
        prompts = slice(start, start + 2 * settings.batch, 2)
        negatives = slice(start + 1, start + 2 * settings.batch, 2)
        work.append(
            Batch(
                texts={
                    "prompt_embeds": context[prompts],
                    "negative_prompt_embeds": context[negatives],
                    "pooled_prompt_embeds": pooled[prompts],
                    "negative_pooled_prompt_embeds": pooled[negatives],
                },
                seed=settings.seed + index,
                size=settings.sizes[index % len(settings.sizes)],
                timesteps=timesteps(settings.steps, index, len(starts)),
            )
        )
    return work


def _decoded(family: Family, module: nn.Module, latents: list[Tensor]) -> list[Tensor]:
    """Decode picture by picture, as the engine does; nothing is kept."""
    rows = [row for batch in latents for row in batch.split(1)]
    with Progress("scan vae_decoder", len(rows), "pictures") as progress:
        for row in rows:
            module(row / family.vae_scaling_factor + family.vae_shift_factor)
            progress.advance()
    return []


def _report(scan: Scan) -> dict[str, Any]:
    remedies = remedies_from_scan(scan)
    powers = {fold.stream: fold.power for fold in remedies.folds}

    def magnitudes(activations: list[Activation]) -> dict[str, float]:
        return {activation.name: activation.folded(powers) for activation in activations}

    return {
        "remedies": remedies.model_dump(mode="json"),
        "overflows": {activation.name: activation.amax for activation in scan.overflows()},
        "overflows_after_folds": magnitudes(scan.overflows(powers)),
        "sinks": {activation.name: activation.amax for activation in scan.sinks()},
        "sinks_after_folds": magnitudes(scan.sinks(powers)),
        "beyond_remedy": {activation.name: activation.amax for activation in scan.beyond()},
        "saturate_without_harm": scan.saturating,
        "weights_made_subnormal": {stream: scan.sunk_by(stream, power) for stream, power in powers.items()},
        "tensors": [
            activation.model_dump() for activation in sorted(scan.activations, key=lambda a: -a.amax)
        ],
    }


def _summary(component: str, scan: Scan) -> str:
    remedies = remedies_from_scan(scan)
    counted = (a for a in scan.activations if a.fp16 and a.module not in scan.saturating)
    largest = max(counted, key=lambda activation: activation.amax)
    lines = [f"{component}: {largest.amax:.3g} at most ({largest.name})"]
    lines += [
        f"  2^-{fold.power} on the {fold.stream} stream: {fold.tensor} {fold.reason}"
        for fold in remedies.folds
    ]
    lines += [
        f"  FP32 island {island.module or 'of the whole'}: {island.tensor} {island.reason}"
        for island in remedies.islands
    ]
    lines += [
        f"  no remedy for {activation.name}, {activation.amax:.3g}: FP16 cannot carry it between the engines"
        for activation in scan.beyond()
    ]
    return "\n".join(lines if len(lines) > 1 else [f"{lines[0]}, no remedy needed"])
