"""The page of an evaluation: the scores, and every picture beside its caption. One file, no network."""

import base64
import html
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from miniature.reader import read, score

if TYPE_CHECKING:
    from miniature.evaluation import Picture
    from miniature.tasks import Task

MEANINGS = {
    "colour": "objects in the right colour",
    "shape": "objects of the right shape",
    "size": "objects of the right size",
    "place": "objects in the right place",
    "both_places": "two-object pictures with both in place",
    "background": "pictures with the right background",
    "everything": "pictures with everything right",
}
COLUMNS = {"fp32": "diffusers, FP32", "fp16": "Triton, FP16", "fp8": "Triton, FP8"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto }
table { border-collapse: collapse; margin: 1em 0 2em }
th, td { padding: .3em .8em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.good { color: #176b2c } .bad { color: #b3261e; font-weight: 600 }
.seen { color: #b3261e; font-size: 13px } img { display: block }
"""


def page(results: dict[str, Any], work: "list[Task]", made: "dict[str, list[Picture]]") -> str:
    """The page as HTML: scores against what was asked, then the pictures, the least alike first."""
    names = [name for name in COLUMNS if name in made]
    parts = [
        "<!doctype html><meta charset=utf-8><title>mmdit-trt: the miniature, evaluated</title>",
        f"<style>{STYLE}</style><h1>The miniature, evaluated</h1>",
        f"<p>{results['captions']} captions that the training never saw, {results['steps']} steps, guidance "
        f"{results['guidance_scale']}, 128×128. Each picture was read by a program that knows the drawn "
        "world, and an object too many counts as a wrong one.</p>",
        _score_table(results, names),
        _ssim_table(results),
        _demand_table(results),
        f"<h2>Pictures</h2><table><tr><th>caption{''.join(f'<th>{COLUMNS[name]}' for name in names)}",
    ]
    alike = results["each_ssim"]
    for number in sorted(range(len(work)), key=lambda index: alike[index]):
        parts.append(_row(work[number], [made[name][number] for name in names], alike[number]))
    return "\n".join([*parts, "</table>"])


def _score_table(results: dict[str, Any], names: list[str]) -> str:
    rows = [f"<tr><th>share of{''.join(f'<th>{COLUMNS[name]}' for name in names)}<th>other sizes, FP16"]
    for what, meaning in MEANINGS.items():
        values = [*(results["scores"][name][what] for name in names), results["other_sizes"][what]]
        rows.append(f"<tr><td>{meaning}{''.join(_cell(f'{100 * value:.1f} %') for value in values)}")
    vae = results["vae"]
    return (
        f"<h2>Scores</h2><table>{''.join(rows)}</table><p>The VAE alone: {vae['psnr_db']:.1f} dB, "
        f"{100 * vae['shape']:.1f} % of the shapes read right from its reconstructions.</p>"
    )


def _demand_table(results: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{html.escape(what)}<td class={'good' if reached else 'bad'}>"
        f"{'reached' if reached else 'not reached'}"
        for what, reached in results["demands"].items()
    ]
    return f"<h2>Asked</h2><table>{''.join(rows)}</table>"


def _ssim_table(results: dict[str, Any]) -> str:
    rows = ["<tr><th>same caption, same noise<th>mean<th>5th percentile<th>minimum"]
    for name, spread in results["ssim"].items():
        rows.append(f"<tr><td>{name}{''.join(_cell(f'{value:.4f}') for value in spread.values())}")
    return (
        "<h2>Structural similarity</h2><p>FP16 against FP32 is the floor: what 16 bits change.</p>"
        f"<table>{''.join(rows)}</table>"
    )


def _cell(text: str) -> str:
    return f"<td class=number>{text}"


def _row(task: "Task", pictures: "list[Picture]", alike: float) -> str:
    cells = []
    for picture in pictures:
        reading = read(picture)
        wrong = "" if score(reading, task.scene).whole else f'<div class="seen">read: {reading.told()}</div>'
        cells.append(f'<td><img src="{_png(picture)}" width=192>{wrong}')
    return f"<tr><td>{html.escape(task.caption)}<br>SSIM {alike:.4f}, seed {task.seed}{''.join(cells)}"


def _png(picture: "Picture") -> str:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
