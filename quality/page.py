"""The report as HTML: the verdict first, then what it rests on."""

import html
from pathlib import Path
from typing import Any

from engines.runtimes import runtime
from quality.chart import velocity_chart
from quality.figure import FIGURES
from quality.gpu_check import summary
from quality.layers import layer_tables
from quality.pictures import picture_table

STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1e293b; background: #fff; max-width: 1180px;
  margin: 0 auto; padding: 1.5em }
h1 { font-size: 1.5em; margin: 0 } h2 { margin: 2em 0 .4em } h3 { margin: 1.4em 0 .3em }
table { border-collapse: collapse; margin: .6em 0 }
th, td { padding: .25em .8em; text-align: left; vertical-align: top; border-bottom: 1px solid #e2e8f0 }
th { font-weight: 600; color: #475569; font-size: 13px }
.number { text-align: right; font-variant-numeric: tabular-nums }
.good { color: #15803d } .bad { color: #b91c1c; font-weight: 600 } .note { color: #64748b; font-size: 13px }
.verdict { border-left: 8px solid; padding: .8em 1.2em; margin: 0 0 1.2em; border-radius: 4px }
.verdict.passed { border-color: #15803d; background: #f0fdf4 }
.verdict.failed { border-color: #b91c1c; background: #fef2f2 }
.verdict p { margin: .3em 0 0 } .verdict ul { margin: .3em 0 0; padding-left: 1.2em }
.tiles { display: flex; flex-wrap: wrap; gap: .8em }
.tile { flex: 1 1 200px; border: 1px solid #e2e8f0; border-radius: 6px; padding: .6em .9em }
.tile b { display: block; font-size: 1.7em; font-variant-numeric: tabular-nums; line-height: 1.25 }
.pictures td { padding: .3em .35em } .pictures .prompt { width: 230px; font-size: 13px; padding-left: 0 }
.pictures img { display: block; width: 168px; image-rendering: auto }
.chart { max-width: 100%; display: block } .wide { overflow-x: auto }
.layers td, .layers th { font-size: 12px; padding: .1em .5em; white-space: nowrap }
summary { cursor: pointer; margin: .8em 0; color: #475569 }
"""


def page(content: dict[str, Any], folder: Path, audit: Any, check: Path | None = None) -> str:
    """The whole page; `content` is gate.json, `folder` holds its pictures, `audit` the export's layers.

    `check` is the page of gpu-check, where there is one.
    """
    title = f"FP8 report: {content['model']}, {content['target']}"
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        _headline(content),
        _tiles(content),
        "<h2>Figures</h2>",
        _figure_table(content),
        "<h2>Pictures</h2>",
        picture_table(content, folder),
        "<h2>Error at each timestep</h2>",
        velocity_chart(content["steps"]),
        "<h2>Layers</h2>",
        layer_tables(audit),
        "<h2>Sizes</h2>",
        _sizes(content["engine_bytes"]),
        f"<h2>On a GPU, beside torch</h2>{summary(check)}" if check else "",
        "<h2>Made with</h2>",
        _settings(content),
        "</html>",
    ]
    return "\n".join(parts)


def _headline(content: dict[str, Any]) -> str:
    passed, mission = content["passed"], content["mission"]
    settings = content["settings"]
    word = "passed" if passed else "failed"
    what = f"{html.escape(content['model'])} for {html.escape(content['target'])}"
    failures = "".join(f"<li>{html.escape(failure)}" for failure in content["failures"])
    meets = "met" if mission["met"] else "not met"
    promise = (
        f"Mission, SSIM of FP8 against FP16 above {mission['asked']:g}: "
        f"<b class={'good' if mission['met'] else 'bad'}>{meets}</b> ({mission['measured']:.4f} on average)."
    )
    told = "FP8 may be served" if passed else "FP8 is not to be served"
    return (
        f"<div class='verdict {word}'><h1>{told}: {what} "
        f"<span class={'good' if passed else 'bad'}>{word}</span> the quality gate</h1>"
        + (f"<ul>{failures}</ul>" if failures else "")
        + f"<p>{promise}</p>"
        f"<p class=note>{settings['prompts']} prompts that calibration did not see, each from the same noise "
        f"in FP32, FP16 and FP8: {settings['steps']} steps, guidance {settings['guidance_scale']:g}, "
        f"{settings['size'][0]}×{settings['size'][1]} pixels.</p></div>"
    )


def _tiles(content: dict[str, Any]) -> str:
    known = {entry["name"]: entry for entry in content["figures"]}
    tiles = []
    for name in ("ssim_mean", "ssim_objects_mean", "ssim_minimum"):
        entry, meaning = known[name], FIGURES[name]
        value, floor = (f"{entry[key]:.{meaning.digits}f}" for key in ("fp8", "floor"))
        tiles.append((meaning.label, value, f"floor, FP16 to FP32: {floor}", entry["failure"]))
    sizes = content["engine_bytes"]
    before, after = sizes["mmdit-fp16"], sizes["mmdit-fp8"]
    tiles.append(
        ("MMDiT engine", f"{100 * after / before:.0f} %", f"{_mb(after)} instead of {_mb(before)}", None)
    )
    cells = "".join(
        f"<div class=tile>{label}<b{' class=bad' if failed else ''}>{value}</b>"
        f"<span class=note>{note}</span></div>"
        for label, value, note, failed in tiles
    )
    return f"<div class=tiles>{cells}</div>"


def _figure_table(content: dict[str, Any]) -> str:
    chosen, emulated = content["profile"], ""
    if runtime(content["runtime"]).emulates_fp8:
        emulated = (
            " <b>On a CPU</b> ONNX Runtime computes FP16 in FP32 between roundings and emulates FP8, so the "
            "floor is better here than a GPU's."
        )
    rows = ["<tr><th>figure<th>FP8 to FP16<th>floor: FP16 to FP32<th>asked of FP8<th><th>what it says"]
    for entry in content["figures"]:
        meaning = FIGURES[entry["name"]]
        label = f"<tr><td>{meaning.label}"
        if entry["fp8"] is None:
            rows.append(f"{label}<td class=note colspan=4>not measured: {html.escape(entry['absent'])}")
        else:
            values = "".join(f"<td class=number>{entry[key]:.{meaning.digits}f}" for key in ("fp8", "floor"))
            asked, verdict = "<td>", "<td>"
            if entry["bound"] is not None:
                asked = f"<td class=number>{'≥' if meaning.higher else '≤'} {entry['bound']:g}"
                verdict = "<td class=bad>failed" if entry["failure"] else "<td class=good>passed"
            rows.append(f"{label}{values}{asked}{verdict}")
        rows.append(f"<td class=note>{meaning.explained}")
    return (
        f"<p>The floor is what 16 bits alone change; FP8 cannot be expected to be better.{emulated} "
        f"Thresholds of the profile <b>{html.escape(chosen['name'])}</b> "
        f"({html.escape(chosen['description'])}); what they rest on: {html.escape(chosen['measured'])}.</p>"
        f"<table>{''.join(rows)}</table>"
    )


def _sizes(sizes: dict[str, int]) -> str:
    rows = ["<tr><th>engine<th>FP16<th>with an FP8 MMDiT<th>"]
    total = [0, 0]
    for folder in sorted(sizes, key=lambda name: -sizes[name]):
        if folder == "mmdit-fp8":
            continue
        before = sizes[folder]
        after = sizes["mmdit-fp8"] if folder == "mmdit-fp16" else before
        total = [total[0] + before, total[1] + after]
        rows.append(_size(html.escape(folder.rsplit("-", 1)[0]), before, after))
    return f"<table>{''.join(rows)}{_size('<b>together</b>', *total)}</table>"


def _size(name: str, before: int, after: int) -> str:
    share = f"{100 * after / before:.1f} %" if after != before else ""
    return (
        f"<tr><td>{name}<td class=number>{_mb(before)}<td class=number>{_mb(after)}<td class=number>{share}"
    )


def _settings(content: dict[str, Any]) -> str:
    first, last = content["settings"]["seeds"]
    rows = {
        "model": content["model"],
        "target": f"{content['target']}, {content['runtime']}",
        "seeds": f"{first} to {last}",
        "time": f"{content['seconds']:.0f} s",
        **content["versions"],
    }
    cells = "".join(
        f"<tr><td>{html.escape(name)}<td>{html.escape(str(value))}" for name, value in rows.items()
    )
    return f"<table>{cells}</table>"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"
