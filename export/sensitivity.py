"""The sensitivity study: one group of layers in FP8 at a time, ranked by the damage; the policy follows from it.

It also says what each group would gain, and with a budget proposes a policy (`export.budget`). Everything is
ModelOpt's fake quantization, compared with the same module without any: FP32 on a CPU, FP16 on a GPU.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import export.quiet  # noqa: F401  isort: skip

from export.budget import Proposal, check_budget, policy_text, propose
from export.calibration import CALIBRATION_FILE, read_calibration, write_calibration
from export.checkpoint import MINIATURE, linears
from export.comparison import Comparison, Damage
from export.groups import ADALN_WEIGHTS, Group, fp8_shares, layer_groups, quantized
from export.modules import Mmdit, load_module
from export.policy import AttentionPrecision, LayerPrecision, Rule
from export.prompts import PROMPTS, CalibrationSettings, calibration_prompts
from export.remedies import Remedies, apply_remedies
from export.sensitivity_chart import draw_sensitivity
from export.switches import Switches
from export.trajectories import device, dtype
from mmdit.artifact import Manifest, sha256, versions, whole
from mmdit.errors import QuantizationError
from mmdit.family import Family
from mmdit.progress import Progress

SENSITIVITY_FILE = "sensitivity.json"
CHART_FILE = "sensitivity.png"
POLICY_FILE = "policy.toml"
POLICY_SET, EVERYTHING = "the policy given", "everything"
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
    count: int = 8,
    steps: int | None = None,
    prompts: Sequence[tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Measure every group and write `sensitivity.json`, its chart and, with a budget, `policy.toml` into `folder`.

    `decisions` and `attention` are of the policy that stands beside the groups; attention's products are
    part of a proposal only where it has them in FP8. `settings` say how the ranges of all candidates are
    calibrated, once: they stay in `.sensitivity` beside `folder`. `budget` is a mean SSIM; `count`
    pictures of `steps` steps (the family's own by default) are compared, of `prompts` (with their negative
    prompts) or of the miniature's held-out captions or the end of the calibration prompts. Returns the
    findings for a manifest. Raises QuantizationError for another `by`, a budget that is no SSIM, or one
    that only a model without FP8 reaches.
    """
    if budget is not None:
        check_budget(budget)
    shapes = linears(checkpoint)
    candidates = {
        name: Rule(pattern=".*", precision=LayerPrecision.FP8, reason="candidate", group="candidate")
        for name, rule in decisions.items()
        if rule.precision is not LayerPrecision.FP32
    }
    groups = layer_groups(family, {name: shapes[name] for name in candidates}, by)
    pairs = list(prompts if prompts is not None else _prompts(checkpoint, count))
    ranges = _ranges(
        family, checkpoint, fingerprint, candidates, remedies, settings, folder.parent / ".sensitivity"
    )

    module = load_module("mmdit", checkpoint, dtype())
    apply_remedies("mmdit", module, remedies)
    assert isinstance(module, Mmdit)
    switches = Switches(module.model, candidates, ranges)
    steps = steps or family.steps
    comparison = Comparison(family, checkpoint, module.model, pairs, steps, _SEED)

    policy = {name: decisions[name].precision for name in candidates}
    all_groups = quantized(groups)
    sets = {
        **{group.name: quantized([group]) for group in groups},
        POLICY_SET: (policy, attention is AttentionPrecision.FP8),
        EVERYTHING: all_groups,
    }
    damages: dict[str, Damage] = {}
    with Progress("measuring", len(sets) * comparison.calls, "calls of the MMDiT") as progress:
        for name, (layers, products) in sets.items():
            progress.note = name
            switches.set(layers, attention=products)
            damages[name] = comparison.measure(progress.advance)
        progress.note = ""

    def entry(name: str, group: Group | None = None) -> dict[str, Any]:
        layers, products = sets[name]
        linear, total = fp8_shares(family, shapes, layers, products)
        stored = [layer for layer, precision in layers.items() if precision in _STORED]
        return {
            "name": name,
            "precision": _precision(group),
            "layers": sorted(stored),
            "linear_flops_share": linear,
            "flops_share": total,
            "weights_share": _weights(shapes, stored) / _weights(shapes, shapes),
            "weight_bytes_saved": _weights(shapes, stored),
            "damage": damages[name].as_json(),
        }

    ranked = sorted(groups, key=lambda group: damages[group.name].velocity_error, reverse=True)
    result: dict[str, Any] = {
        "model": family.name,
        "by": by,
        "reference": f"the same module without quantizers, {str(dtype()).removeprefix('torch.').upper()}",
        "device": device().type,
        "prompts": [prompt for prompt, _ in pairs],
        "steps": steps,
        "guidance_scale": family.guidance_scale,
        "size": family.default_size,
        "timesteps": comparison.timesteps,
        "calibration": settings.model_dump(mode="json"),
        "groups": [entry(group.name, group) for group in ranked],
        "sets": [entry(POLICY_SET), entry(EVERYTHING)],
    }
    print("\n".join(_table(result)), flush=True)
    if budget is not None:
        proposed = _proposed(groups, damages, switches, comparison, budget, attention)
        result["proposal"] = _described(proposed, family, shapes, switches, comparison, attention)
        header = _header(result, proposed)
        (folder / POLICY_FILE).write_text(policy_text(proposed, damages, header), encoding="utf-8")
        print("\n".join(f"  {line}" for line in header), flush=True)
    (folder / SENSITIVITY_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw_sensitivity(
        f"{family.name}: one group in FP8 at a time, {len(pairs)} pictures of {steps} steps",
        result["groups"],
        result["sets"],
        folder / CHART_FILE,
    )
    return {
        "worst": result["groups"][0]["name"],
        "policy_mean_ssim": damages[POLICY_SET].mean_ssim,
        **({"proposal": result["proposal"]} if budget is not None else {}),
    }


_STORED = (LayerPrecision.FP8, LayerPrecision.FP8_WEIGHTS)


def _prompts(checkpoint: Path, count: int) -> list[tuple[str, str]]:
    """What the pictures show: the miniature knows its own captions alone."""
    if checkpoint.resolve() == MINIATURE.resolve():
        from miniature.evaluation import tasks

        return [(task.caption, "") for task in tasks(count)]
    found = calibration_prompts()
    if not 1 <= count <= len(found):
        raise QuantizationError(f"{count} pictures were asked for: expected 1 to {len(found)}")
    return found[-count:]


def _ranges(
    family: Family,
    checkpoint: Path,
    fingerprint: str,
    candidates: dict[str, Rule],
    remedies: Remedies,
    settings: CalibrationSettings,
    folder: Path,
) -> dict[str, float]:
    """The ranges of all candidates' inputs; of an earlier study when they are of the same calibration."""
    manifest = Manifest(
        kind="calibration",
        checkpoint=fingerprint,
        made_from={PROMPTS.name: sha256(PROMPTS)},
        settings={
            "t5_tokens": family.t5_tokens,
            "candidates": sorted(candidates),
            "remedies": remedies.model_dump(mode="json"),
            **settings.model_dump(mode="json"),
        },
        versions=versions("torch", "diffusers", "transformers", "nvidia-modelopt"),
    )
    saved = folder / "calibration"
    fp8 = AttentionPrecision.FP8
    reason = manifest.reason_to_rebuild(saved)
    if reason is None:
        print("ranges of all candidates: up to date", flush=True)
    else:
        print(f"ranges of all candidates: calibrating ({reason})", flush=True)
        with whole(saved, manifest) as partial:
            write_calibration(family, checkpoint, fingerprint, candidates, fp8, remedies, settings, partial)
    return read_calibration(saved / CALIBRATION_FILE, fingerprint, candidates, fp8).amax


def _proposed(
    groups: Sequence[Group],
    damages: Mapping[str, Damage],
    switches: Switches,
    comparison: Comparison,
    budget: float,
    attention: AttentionPrecision,
) -> Proposal:
    """The search over the groups that a policy may combine: AdaLN has FP8 weights, attention as allowed."""
    split = any(group.name == ADALN_WEIGHTS for group in groups)
    allowed = [
        group
        for group in groups
        if (attention is AttentionPrecision.FP8 if group.attention else not (split and _is_adaln_both(group)))
    ]
    with Progress(
        "searching the policy", len(allowed) * comparison.calls, "calls of the MMDiT at most"
    ) as progress:

        def measure(kept: Sequence[Group]) -> Damage:
            layers, products = quantized(kept)
            switches.set(layers, attention=products)
            return comparison.measure(progress.advance)

        proposal = propose(allowed, damages, measure, budget)
        progress.stop()
    return proposal


def _is_adaln_both(group: Group) -> bool:
    return all("norm1" in layer for layer in group.layers) and LayerPrecision.FP8 in group.layers.values()


def _described(
    proposal: Proposal,
    family: Family,
    shapes: Mapping[str, tuple[int, int]],
    switches: Switches,
    comparison: Comparison,
    attention: AttentionPrecision,
) -> dict[str, Any]:
    layers, products = quantized(proposal.kept)
    linear, total = fp8_shares(family, shapes, layers, products)
    described = {
        "budget": proposal.budget,
        "mean_ssim": proposal.damage.mean_ssim,
        "linear_flops_share": linear,
        "flops_share": total,
        "weights_share": _weights(shapes, layers) / _weights(shapes, shapes),
        "kept": [group.name for group in proposal.kept],
        "taken_out": [group.name for group in proposal.taken_out],
        "tried": [{"taken_out": count, "mean_ssim": ssim} for count, ssim in proposal.tried],
        "damage": proposal.damage.as_json(),
    }
    if attention is AttentionPrecision.FP16:
        switches.set(layers, attention=True)
        with Progress(
            "the proposal with attention's products", comparison.calls, "calls of the MMDiT"
        ) as progress:
            described["mean_ssim_with_attention"] = comparison.measure(progress.advance).mean_ssim
    return described


def _header(result: Mapping[str, Any], proposal: Proposal) -> list[str]:
    """What the proposed policy is and what was measured, as lines."""
    found = result["proposal"]
    lines = [
        f"A policy proposed by the sensitivity study of {result['model']}: a mean SSIM of {proposal.budget} was asked,",
        f"{found['mean_ssim']:.5f} was measured ({len(result['prompts'])} pictures of {result['steps']} steps) with "
        f"{found['linear_flops_share']:.1%} of the linear",
        f"FLOPs in FP8, {found['flops_share']:.1%} of all FLOPs, and {found['weights_share']:.1%} of the linear weights.",
        f"Taken out: {', '.join(found['taken_out']) or 'nothing'}.",
    ]
    if "mean_ssim_with_attention" in found:
        lines.append(
            "Attention's products stay FP16 as in the policy given; in FP8 too, the mean SSIM would be "
            f"{found['mean_ssim_with_attention']:.5f}."
        )
    return lines


def _table(result: Mapping[str, Any]) -> list[str]:
    """The groups, worst first, and the sets."""
    head = f"{'in FP8':<30}{'velocity':>10}{'1 − cos':>10}{'SSIM':>9}{'worst':>9}{'linears':>9}{'FLOPs':>8}{'weights':>9}"
    lines = [head]
    for entry in (*result["groups"], *result["sets"]):
        damage = entry["damage"]
        lines.append(
            f"{entry['name']:<30}{damage['velocity_error']:>10.3%}{damage['cosine_distance']:>10.1e}"
            f"{damage['mean_ssim']:>9.5f}{damage['minimum_ssim']:>9.5f}{entry['linear_flops_share']:>9.1%}"
            f"{entry['flops_share']:>8.1%}{entry['weights_share']:>9.1%}"
        )
    return lines


def _precision(group: Group | None) -> str:
    if group is None or group.attention:
        return "fp8"
    found = {precision.value for precision in group.layers.values()}
    return found.pop() if len(found) == 1 else "mixed"


def _weights(shapes: Mapping[str, tuple[int, int]], layers: Any) -> int:
    return sum(shapes[layer][0] * shapes[layer][1] for layer in layers)
