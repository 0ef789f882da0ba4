"""The gate: FP16 against FP8, beside each figure its floor, a verdict, and the pictures to look at.

`build/<model>/quality/<target>/`: gate.json, pictures/<number>-<fp32|fp16|fp8>.png, manifest.json, whose
findings the packager reads.
"""

import json
import shutil
import time
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from engines.runtimes import runtime
from mmdit.artifact import Manifest, digest, read_manifest, shown, versions, whole
from mmdit.code import code_of
from mmdit.errors import ArtifactError, QuantizationError
from quality.figure import FIGURES, Figure
from quality.perceptual import weights as perceptual_weights
from quality.profile import Profile, profile
from quality.prompts import Task, evaluation_tasks, tasks_digest
from quality.subject import Subject

GATE = "gate.json"
MISSION = ("ssim_mean", 0.97)  # what the project promises of FP8 against FP16, whatever the profile
_TOOLS = ("numpy", "torch", "scikit-image", "scipy")
_JUDGING = ("profile", "thresholds", "judging")  # settings: when they alone differ, nothing is measured anew


@dataclass(frozen=True)
class Asked:
    """What the gate is to make; None stands for the default."""

    profile: str | None = None
    prompts: Path | None = None
    count: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Verdict:
    """`failures` say what failed, in words; `mission` whether the mean SSIM is above the promised 0.97."""

    passed: bool
    mission: bool
    failures: list[str]


def gate(subject: Subject, asked: Asked) -> Verdict:
    """Make the gate's artifact unless it is up to date; print the figures and the verdict.

    Loads torch only when there is something to make. Raises QuantizationError for prompts or a profile
    that cannot be used, ArtifactError for engines that are not there.
    """
    name = asked.profile or ("miniature" if subject.is_miniature else "sd35")
    chosen = profile(name)
    usual = 16 if subject.is_miniature else 32
    count = usual if asked.count is None else asked.count
    tasks = evaluation_tasks(count, miniature=subject.is_miniature, file=asked.prompts)
    steps = subject.family.steps if asked.steps is None else asked.steps
    if not 1 <= steps <= 1000:
        raise QuantizationError(f"--steps {steps} is out of range: expected 1 to 1000")
    folder = subject.layout.quality(subject.target)
    manifest = Manifest(
        kind="quality",
        checkpoint=subject.checkpoint,
        made_from=subject.files | {"prompts": tasks_digest(tasks)},
        settings={
            "target": subject.target,
            "profile": name,
            "thresholds": chosen.model_dump(mode="json")["thresholds"],
            "prompts": len(tasks),
            "seeds": [tasks[0].seed, tasks[-1].seed],
            "steps": steps,
            "guidance_scale": subject.family.guidance_scale,
            "size": list(subject.size),
            "perceptual": [name for name in ("torchmetrics", "torchvision") if util.find_spec(name)]
            + [str(path) for path in perceptual_weights() if path.exists()],
            "judging": digest(code_of(_verdict)),
        },
        code=code_of(_measured, runtime(subject.runtime).functions.open),
        versions=versions(*_TOOLS) | subject.manifests["mmdit-fp8"].versions,
    )
    reason = manifest.reason_to_rebuild(folder)
    if reason is None:
        print(f"gate: up to date: {shown(folder)}")
    elif before := _measured_before(folder, manifest):
        print(f"gate: judging again what was measured ({reason})", flush=True)
        with whole(folder, manifest) as partial:
            shutil.copytree(folder / "pictures", partial / "pictures")
            figures = [Figure.model_validate(entry) for entry in before["figures"]]
            _write(before | _verdict(figures, chosen, name), manifest, partial)
    else:
        print(f"gate: {len(tasks)} pictures in FP32, FP16 and FP8, {steps} steps ({reason})", flush=True)
        start = time.monotonic()
        with whole(folder, manifest) as partial:
            content, figures = _measured(subject, tasks, manifest, partial)
            content["seconds"] = round(time.monotonic() - start, 1)
            _write(content | _verdict(figures, chosen, name), manifest, partial)
    findings = read_manifest(folder).findings
    for line in summary(findings, name):
        print(line)
    if reason is not None:
        print(f"gate: measured in {findings['seconds']:.0f} s: {shown(folder)}")
    return Verdict(findings["passed"], findings["mission"]["met"], findings["failures"])


def judged(figures: list[Figure], chosen: Profile) -> tuple[list[dict[str, Any]], list[str]]:
    """Each figure with its bound and why it fails (None: it does not), and all that failed."""
    entries, failures = [], []
    known = {figure.name: figure for figure in figures}
    for name in chosen.thresholds.keys() - known.keys():
        known[name] = Figure(name=name, fp8=None, floor=None, absent="it does not apply to this model")
    for name in FIGURES:
        if name not in known:
            continue
        figure, threshold = known[name], chosen.thresholds.get(name)
        failure = threshold.judged(figure) if threshold else None
        bound = threshold.bound(figure.floor) if threshold else None
        entries.append(figure.model_dump() | {"bound": bound, "failure": failure})
        failures += [failure] if failure else []
    return entries, failures


def summary(findings: dict[str, Any], profile_name: str) -> list[str]:
    """The figures and the verdict, as lines to print."""
    rows: list[tuple[str, ...]] = [("", "FP8 to FP16", "FP16 to FP32", "asked", "")]
    absent = []
    for entry in findings["figures"].values():
        meaning = FIGURES[entry["name"]]
        if entry["fp8"] is None:
            absent.append(f"  not measured: {meaning.label} ({entry['absent']})")
            continue
        values = [f"{entry[key]:.{meaning.digits}f}" for key in ("fp8", "floor")]
        sign = "≥" if meaning.higher else "≤"
        asked = "" if entry["bound"] is None else f"{sign} {entry['bound']:g}"
        rows.append((meaning.label, *values, asked, "FAILED" if entry["failure"] else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells, asked, failed in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:3], strict=True))
        lines.append(
            f"  {label.ljust(widths[0])}  {'  '.join(numbers)}  {asked.ljust(widths[3])}  {failed}".rstrip()
        )
    mission = findings["mission"]
    met = "met" if mission["met"] else "not met"
    return [
        *lines,
        *absent,
        f"  mission, mean SSIM > {mission['asked']:g}: {met} ({mission['measured']:.4f})",
        f"gate: {'passed' if findings['passed'] else 'FAILED'} (profile {profile_name})",
    ]


def _measured_before(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The gate.json of an artifact that differs from the one wanted in how it was judged alone."""
    try:
        found = read_manifest(folder)
    except ArtifactError:
        return None
    old = {key: found.settings.get(key) for key in _JUDGING}
    same = manifest.model_copy(update={"settings": manifest.settings | old})
    if same.reason_to_rebuild(folder) is not None:
        return None
    content: dict[str, Any] = json.loads((folder / GATE).read_text(encoding="utf-8"))
    return content


def _verdict(figures: list[Figure], chosen: Profile, name: str) -> dict[str, Any]:
    entries, failures = judged(figures, chosen)
    figure, least = MISSION
    reached = next(entry["fp8"] for entry in entries if entry["name"] == figure)
    return {
        "passed": not failures,
        "failures": failures,
        "mission": {"figure": figure, "asked": least, "measured": reached, "met": reached > least},
        "profile": {"name": name, **chosen.model_dump(mode="json")},
        "figures": entries,
    }


def _write(content: dict[str, Any], manifest: Manifest, folder: Path) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (folder / GATE).write_text(text, encoding="utf-8")
    manifest.findings = {key: content[key] for key in ("passed", "failures", "mission", "seconds")}
    manifest.findings["figures"] = {each["name"]: each for each in content["figures"]}


def _measured(
    subject: Subject, tasks: list[Task], manifest: Manifest, folder: Path
) -> tuple[dict[str, Any], list[Figure]]:
    """Measure, write the pictures, and give what gate.json says but for the verdict, and the figures."""
    import numpy as np
    from PIL import Image

    from quality.comparison import compared
    from quality.measurement import measured
    from quality.trajectory import Settings

    settings = Settings(
        limits=subject.limits,
        context_dim=subject.family.context_dim,
        steps=manifest.settings["steps"],
        guidance_scale=subject.family.guidance_scale,
        size=subject.size,
    )
    measurement = measured(subject, tasks, settings)
    figures, each = compared(measurement, tasks)
    (folder / "pictures").mkdir()
    for name, pictures in measurement.pictures.items():
        for number, picture in enumerate(pictures):
            shown_as = np.zeros((*subject.size, 3), np.uint8) if picture is None else picture
            Image.fromarray(shown_as).save(folder / "pictures" / f"{number:03}-{name}.png")
            each[number].setdefault("files", {})[name] = f"pictures/{number:03}-{name}.png"
    content = {
        "model": subject.layout.name,
        "target": subject.target,
        "runtime": subject.runtime,
        "settings": {
            key: manifest.settings[key] for key in ("prompts", "seeds", "steps", "guidance_scale", "size")
        },
        "steps": measurement.steps,
        "pictures": each,
        "engine_bytes": subject.bytes,
        "versions": manifest.versions,
    }
    return content, figures
