"""The sensitivity study: one group of layers in FP8 at a time, ranked by damage; the policy follows from it.

It also says what each group would gain, and with a budget proposes a policy (`export.budget`). Everything is
ModelOpt's fake quantization, compared with the same module without any: FP32 on a CPU, FP16 on a GPU.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import export.quiet  # noqa: F401  isort: skip

from export.budget import Proposal, check_budget, combinable, policy_header, policy_text, propose
from export.candidates import candidate_ranges, candidate_rules, ranges_manifest
from export.checkpoint import MINIATURE, linears
from export.comparison import Comparison, Damage
from export.groups import Group, fp8_shares, layer_groups, quantized
from export.measurements import Measurements
from export.modules import Mmdit, load_module
from export.policy import AttentionPrecision, LayerPrecision, Rule
from export.prompts import CalibrationSettings, calibration_prompts
from export.remedies import Remedies, apply_remedies
from export.sensitivity_chart import draw_sensitivity
from export.switches import Switches
from export.trajectories import device, dtype
from mmdit.artifact import digest
from mmdit.code import code_of
from mmdit.errors import QuantizationError
from mmdit.family import Family
from mmdit.progress import Progress

SENSITIVITY_FILE = "sensitivity.json"
CHART_FILE = "sensitivity.png"
POLICY_FILE = "policy.toml"
POLICY_SET, EVERYTHING = "the policy given", "everything"
KEPT = ".sensitivity"  # beside the artifact: ranges and figures, for the next study
_SEED = 1_000_000  # far from the seeds of calibration


def study(
    family: Family,
    checkpoint: Path,
    fingerprint: str,
    decisions: Mapping[str, Rule],
    attention: AttentionPrecision,
    remedies: Remedies,
    settings: CalibrationSettings,
    folder: Path,
    *,
    by: str = "role",
    budget: float | None = None,
    pictures: int = 8,
    steps: int | None = None,
    prompts: Sequence[tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Measure every group; write `sensitivity.json`, its chart and, with a budget, `policy.toml` to `folder`.

    `decisions` and `attention` are of the policy that stands beside the groups; attention's products are
    part of a proposal only where it has them in FP8. `settings` say how the ranges of all candidates are
    calibrated, once. `budget` is a mean SSIM over `pictures` pictures of `steps` steps (by default the
    family's own) of `prompts`, pairs with a negative prompt; by default the miniature's held-out captions, or
    the end of the calibration prompts. Returns a manifest's findings. Raises QuantizationError for another
    `by`, a budget that is no SSIM, or one that only a model without FP8 reaches.
    """
    if budget is not None:
        check_budget(budget)
    shapes = linears(checkpoint)
    candidates = candidate_rules(decisions)
    groups = layer_groups(family, shapes, candidates, by)
    pairs = list(_prompts(checkpoint, pictures) if prompts is None else prompts)
    steps = family.steps if steps is None else steps
    if steps < 1:
        raise QuantizationError(f"{steps} steps were asked for: expected 1 or more")
    kept = folder.parent / KEPT
    calibration = ranges_manifest(family, fingerprint, candidates, remedies, settings)
    ranges = candidate_ranges(family, checkpoint, calibration, candidates, remedies, settings, kept)

    module = load_module("mmdit", checkpoint, dtype())
    assert isinstance(module, Mmdit)
    apply_remedies("mmdit", module, remedies)
    switches = Switches(module.model, candidates, ranges)
    comparison = Comparison(family, checkpoint, module.model, pairs, steps, _SEED)
    identity = digest([calibration.model_dump(), pairs, steps, family.model_dump(), code_of(study)])
    measured = Measurements(switches, comparison, kept / f"measured-{device().type}.json", identity)

    sets = {
        **{group.name: quantized([group]) for group in groups},
        POLICY_SET: (
            {name: decisions[name].precision for name in candidates},
            attention is AttentionPrecision.FP8,
        ),
        EVERYTHING: quantized(groups),
    }
    damages: dict[str, Damage] = {}
    with Progress("measuring", len(sets) * comparison.calls, "calls of the MMDiT") as progress:
        for name, (layers, products) in sets.items():
            progress.note = name
            damages[name] = measured.damage(layers, attention=products, after_call=progress.advance)
        progress.note = ""
    ranked = sorted(groups, key=lambda group: damages[group.name].velocity_error, reverse=True)

    def entry(name: str, precision: str) -> dict[str, Any]:
        gain = _gain(family, shapes, *sets[name])
        return {"name": name, "precision": precision, **gain, "damage": damages[name].figures()}

    result: dict[str, Any] = {
        "model": family.name,
        "by": by,
        "reference": f"without quantizers, in {str(dtype()).removeprefix('torch.')}",
        "prompts": [prompt for prompt, _ in pairs],
        "steps": steps,
        "guidance_scale": family.guidance_scale,
        "size": family.default_size,
        "timesteps": comparison.timesteps,
        "calibration": settings.model_dump(mode="json"),
        "groups": [entry(group.name, _precision(group)) for group in ranked],
        "sets": [entry(POLICY_SET, "mixed"), entry(EVERYTHING, "mixed")],
    }
    print("\n".join(_table(result)), flush=True)
    if budget is not None:
        allowed = combinable(groups, attention)
        try_attention = attention is AttentionPrecision.FP16
        proposal, more = _searched(allowed, damages, measured, budget, try_attention=try_attention)
        result["proposal"] = {
            "budget": budget,
            "mean_ssim": proposal.damage.mean_ssim,
            **_gain(family, shapes, *quantized(proposal.kept)),
            "kept": [group.name for group in proposal.kept],
            "taken_out": [group.name for group in proposal.taken_out],
            "tried": proposal.tried,
            "damage": proposal.damage.figures(),
            **({"mean_ssim_with_attention": more.mean_ssim} if more else {}),
        }
        header = policy_header(result)
        (folder / POLICY_FILE).write_text(policy_text(proposal, damages, header), encoding="utf-8")
        print("\n".join(header), flush=True)
    (folder / SENSITIVITY_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw_sensitivity(
        f"{family.name}: one group in FP8 at a time (pictures: {len(pairs)}, steps: {steps})",
        result["groups"],
        result["sets"],
        folder / CHART_FILE,
    )
    findings = {"worst": ranked[0].name, "policy_mean_ssim": damages[POLICY_SET].mean_ssim}
    proposed = result.get("proposal", {})
    return findings | {
        f"proposal_{key}": proposed[key]
        for key in ("mean_ssim", "linear_flops_share", "flops_share")
        if key in proposed
    }


def _prompts(checkpoint: Path, count: int) -> list[tuple[str, str]]:
    """What the pictures show; the miniature knows the captions of its own world alone."""
    if checkpoint.resolve() == MINIATURE.resolve():
        from miniature.tasks import tasks

        return [(task.caption, "") for task in tasks(count)]
    found = calibration_prompts()
    if not 1 <= count <= len(found):
        raise QuantizationError(f"{count} pictures were asked for: expected 1 to {len(found)}")
    return found[-count:]


def _searched(
    allowed: Sequence[Group],
    damages: Mapping[str, Damage],
    measured: Measurements,
    budget: float,
    *,
    try_attention: bool,
) -> tuple[Proposal, Damage | None]:
    """The proposal; and what attention's products would add to its damage, where it may not have them."""
    calls = (len(allowed) + try_attention) * measured.comparison.calls
    with Progress("searching", calls, "calls of the MMDiT at most") as progress:

        def measure(kept: Sequence[Group]) -> Damage:
            layers, products = quantized(kept)
            return measured.damage(layers, attention=products, after_call=progress.advance)

        proposal = propose(allowed, damages, measure, budget)
        more = None
        if try_attention:
            layers, _ = quantized(proposal.kept)
            more = measured.damage(layers, attention=True, after_call=progress.advance)
        progress.stop()
    return proposal, more


def _gain(
    family: Family,
    shapes: Mapping[str, tuple[int, int]],
    layers: Mapping[str, LayerPrecision],
    attention: bool,
) -> dict[str, Any]:
    """The layers that are stored as E4M3, their shares, and the bytes that they save against FP16."""
    stored = [
        name for name, each in layers.items() if each in (LayerPrecision.FP8, LayerPrecision.FP8_WEIGHTS)
    ]
    weights = {name: outputs * inputs for name, (outputs, inputs) in shapes.items()}
    saved = sum(weights[name] for name in stored)
    linear, total = fp8_shares(family, shapes, layers, attention)
    return {
        "layers": sorted(stored),
        "linear_flops_share": linear,
        "flops_share": total,
        "weights_share": saved / sum(weights.values()),
        "weight_bytes_saved": saved,
    }


def _precision(group: Group) -> str:
    found = {precision.value for precision in group.layers.values()} or {AttentionPrecision.FP8.value}
    return found.pop() if len(found) == 1 else "mixed"


def _table(result: Mapping[str, Any]) -> list[str]:
    """The groups, worst first, and the sets; shares are of what FP8 takes over."""
    columns = ("velocity", "1 − cos", "SSIM", "worst", "linears", "FLOPs", "weights")
    lines = [f"{'in FP8':<30}" + "".join(f"{column:>10}" for column in columns)]
    for entry in (*result["groups"], *result["sets"]):
        damage = entry["damage"]
        lines.append(
            f"{entry['name']:<30}{damage['velocity_error']:>10.3%}{damage['cosine_distance']:>10.1e}"
            f"{damage['mean_ssim']:>10.5f}{damage['minimum_ssim']:>10.5f}{entry['linear_flops_share']:>10.1%}"
            f"{entry['flops_share']:>10.1%}{entry['weights_share']:>10.1%}"
        )
    return lines
