"""Whether FP8 engines may be served: what the quality gate found about exactly these files."""

from typing import Any

from mmdit.artifact import Layout, read_manifest
from mmdit.errors import ArtifactError, RepositoryError


def quality_of(files: dict[str, str], layout: Layout, target: str, *, accept: bool) -> dict[str, Any]:
    """What a repository's manifest says about the quality of the FP8 engines that it holds.

    `files` are the engines' files, as `<engine folder>/<file>`, with their SHA-256. With a passed gate, its
    profile and figures; else, with `accept`, that they were accepted, and what was wrong. Raises
    RepositoryError, which names what failed and the ways out, for engines that are neither.
    """
    try:
        gate = read_manifest(layout.quality(target))
    except ArtifactError:
        return _accepted("their quality gate was never run", layout, target, accept)
    others = sorted(file for file, value in files.items() if gate.made_from.get(file) != value)
    if others:
        return _accepted(f"their quality gate was run on other files ({others[0]})", layout, target, accept)
    if not gate.findings.get("passed"):
        failures = "; ".join(gate.findings.get("failures", ["no verdict"]))
        return _accepted(f"their quality gate failed: {failures}", layout, target, accept)
    figures = gate.findings["figures"].values()
    return {
        "verdict": "passed",
        "profile": gate.settings["profile"],
        "mission": gate.findings["mission"],
        **{key: gate.settings[key] for key in ("prompts", "steps", "size", "thresholds")},
        "figures": {each["name"]: {"fp8": each["fp8"], "floor": each["floor"]} for each in figures},
    }


def _accepted(reason: str, layout: Layout, target: str, accept: bool) -> dict[str, Any]:
    if accept:
        return {"verdict": "accepted", "reason": reason}
    raise RepositoryError(
        f"the FP8 engines of {layout.name} for {target} are not to be served: {reason}. Run "
        f"`make gate MODEL={layout.model} TARGET={target}`, serve PRECISION=fp16, or package them all the "
        "same with --accept-quality (make: ACCEPT_QUALITY=1), which the repository's manifest then says"
    )
