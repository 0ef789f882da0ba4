"""Scores what is served: 200 held-out captions through Triton, in FP16 and in FP8, read back.

Beside them the same captions and the same noise through diffusers in FP32: the floor of what any
16-bit engine changes.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import export.quiet  # noqa: F401  isort: skip
import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio

from miniature.page import page
from miniature.reader import read, score
from miniature.scenes import draw, scenes
from miniature.tasks import Task, scores, tasks
from miniature.vae_training import reconstruct
from mmdit.artifact import Layout, shown
from mmdit.contract import Precision
from mmdit.errors import MmditError
from mmdit.family import family_from_checkpoint
from mmdit.progress import Progress
from mmdit.target import find_gpu, has_fp8, resolve, tensorrt_version
from quality.metrics import similarity
from serve.client import Client
from serve.launcher import running
from serve.ports import Ports

STEPS = 20
OTHER_SIZES = ((112, 160), (160, 112), (96, 128))  # height, width
OTHER_COUNT = 24  # captions at each of them
AT_ONCE = 4  # requests

# What was asked for: shares in FP16, how much of each FP8 may lose, and the mean SSIM between the two.
ASKED = {"colour": 0.90, "shape": 0.85, "both_places": 0.80}
LOST = 0.02
SSIM = 0.97
VAE = {"psnr_db": 30.0, "shape": 0.95}

Picture = NDArray[np.uint8]


def evaluate(build: Path, out: Path, checkpoint: Path, *, target: str, captions: int) -> None:
    """Score the FP16 and the FP8 repository of the miniature and write `out/index.html`, `scores.json`.

    Raises MmditError when a repository is missing or its server fails.
    """
    work = tasks(captions)
    others = [task for size in OTHER_SIZES for task in tasks(OTHER_COUNT, *size)]
    layout = Layout("miniature", build)
    if target == "auto":
        target = resolve(target, find_gpu(), tensorrt_version())[0].name
    precisions = [Precision.FP16, Precision.FP8] if has_fp8(target) else [Precision.FP16]
    made: dict[str, list[Picture]] = {}
    elsewhere: list[Picture] = []
    for precision in precisions:
        repository = layout.repository(target, precision)
        if not repository.is_dir():
            raise MmditError(f"{shown(repository)} is not there yet: run `make evaluate`")
        ports = Ports.free()
        with running(repository, ports, layout.root / "triton" / f"evaluate-{precision.value}.log"):
            url = f"localhost:{ports.grpc}"
            made[precision.value] = list(_served(url, work, f"{precision.value}, 128x128"))
            if precision is Precision.FP16:
                elsewhere = list(_served(url, others, "fp16, other sizes"))
    guidance = family_from_checkpoint(checkpoint).guidance_scale
    made["fp32"] = list(_reference(checkpoint, work, guidance))
    last, before = ("fp8", "fp16") if "fp8" in made else ("fp16", "fp32")
    alike = [similarity(a, b) for a, b in zip(made[last], made[before], strict=True)]
    results: dict[str, Any] = {
        "captions": len(work),
        "steps": STEPS,
        "guidance_scale": guidance,
        "scores": {name: scores(pictures, work) for name, pictures in made.items()},
        "other_sizes": scores(elsewhere, others),
        "ssim": {
            f"{one} against {other}": _spread(
                [similarity(a, b) for a, b in zip(made[one], made[other], strict=True)]
            )
            for one, other in (("fp8", "fp16"), ("fp16", "fp32"))
            if one in made
        },
        "vae": _vae(checkpoint),
        "each_ssim": alike,
    }
    results["demands"] = demands(results)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("scores.json", json.dumps(results, indent=2) + "\n"),
        ("index.html", page(results, work, made)),
    ):
        (out / f".{name}").write_text(text, encoding="utf-8")
        (out / f".{name}").replace(out / name)
    print(f"{shown(out / 'index.html')}")
    for line in summary(results):
        print(line)


def demands(results: dict[str, Any]) -> dict[str, bool]:
    """What was asked for → whether it was reached."""
    reached, vae = results["scores"], results["vae"]
    found = {
        f"{what.replace('_', ' ')} ≥ {low:.0%} in FP16": reached["fp16"][what] >= low
        for what, low in ASKED.items()
    }
    if "fp8" in reached:
        for what in ASKED:
            kept = reached["fp8"][what] >= reached["fp16"][what] - LOST
            found[f"{what.replace('_', ' ')} in FP8 within {100 * LOST:.0f} points"] = kept
        found[f"mean SSIM of FP8 ≥ {SSIM}"] = results["ssim"]["fp8 against fp16"]["mean"] >= SSIM
    found[f"VAE ≥ {VAE['psnr_db']:.0f} dB"] = vae["psnr_db"] >= VAE["psnr_db"]
    found[f"VAE: shapes ≥ {VAE['shape']:.0%}"] = vae["shape"] >= VAE["shape"]
    return found


def summary(results: dict[str, Any]) -> list[str]:
    """The scores as lines to print, and what was not reached."""
    lines = []
    for name, shares in (*results["scores"].items(), ("fp16, other sizes", results["other_sizes"])):
        parts = [f"{what.replace('_', ' ')} {100 * value:.1f} %" for what, value in shares.items()]
        lines.append(f"{name}: " + ", ".join(parts))
    for name, spread in results["ssim"].items():
        parts = [f"{what} {value:.4f}" for what, value in spread.items()]
        lines.append(f"SSIM, {name}: " + ", ".join(parts))
    vae = results["vae"]
    lines.append(f"VAE: {vae['psnr_db']:.1f} dB, shapes {100 * vae['shape']:.1f} %")
    missed = [name for name, reached in results["demands"].items() if not reached]
    lines.append(f"not reached: {'; '.join(missed)}" if missed else "everything that was asked is reached")
    return lines


def _served(url: str, work: list[Task], label: str) -> Iterator[Picture]:
    with Client(url) as client, ThreadPoolExecutor(AT_ONCE) as pool, Progress(label, len(work)) as bar:

        def picture(task: Task) -> Picture:
            made = client.generate(
                task.caption,
                seed=task.seed,
                steps=STEPS,
                height=task.height,
                width=task.width,
            )
            return made.image

        for image in pool.map(picture, work):
            bar.advance()
            yield image


def _reference(checkpoint: Path, work: list[Task], guidance: float, batch: int = 8) -> Iterator[Picture]:
    """The same pictures by diffusers in FP32."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with Progress("fp32, diffusers", len(work)) as bar:
        for start in range(0, len(work), batch):
            part = work[start : start + batch]
            images = pipeline(
                [task.caption for task in part],
                height=part[0].height,
                width=part[0].width,
                num_inference_steps=STEPS,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(task.seed) for task in part],
                output_type="np",
            ).images
            for image in images:
                bar.advance()
                yield (image * 255).round().astype(np.uint8)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "5th percentile": float(np.percentile(values, 5)),
        "minimum": float(np.min(values)),
    }


def _vae(checkpoint: Path, count: int = 200) -> dict[str, float]:
    """PSNR and shapes of held-out scenes after the VAE's encoder and decoder, in FP32."""
    vae = AutoencoderKL.from_pretrained(checkpoint, subfolder="vae", torch_dtype=torch.float32)
    rng = np.random.default_rng(3)
    unseen = [scene for scene in scenes() if scene.held_out]
    chosen = [unseen[index] for index in rng.permutation(len(unseen))[:count]]
    drawn = [draw(scene, 128, 128, rng) for scene in chosen]
    made = reconstruct(vae, drawn)
    read_as = [score(read(picture), scene) for picture, scene in zip(made, chosen, strict=True)]
    return {
        "psnr_db": float(np.mean([peak_signal_noise_ratio(a, b) for a, b in zip(drawn, made, strict=True)])),
        "shape": sum(each.shape for each in read_as) / sum(each.count for each in read_as),
    }
