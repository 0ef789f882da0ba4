"""The search for the policy with the most FLOPs in FP8 that reaches a mean SSIM, and its policy file."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from export.groups import ADALN_BOTH, ADALN_WEIGHTS, Group
from export.policy import AttentionPrecision, LayerPrecision
from mmdit.errors import QuantizationError

if TYPE_CHECKING:  # a budget is checked without torch
    from export.comparison import Damage


@dataclass(frozen=True)
class Proposal:
    """Groups in FP8, and groups taken out again, the worst for its FLOPs first.

    `damage` was measured with exactly the kept groups in FP8; `tried` are the mean SSIMs on the way: of
    all groups, without the first that was taken out, without the first two …
    """

    budget: float
    kept: tuple[Group, ...]
    taken_out: tuple[Group, ...]
    damage: "Damage"
    tried: tuple[float, ...]


def check_budget(budget: float) -> None:
    """Raises QuantizationError for a budget that is no mean SSIM."""
    if not 0 < budget <= 1:
        raise QuantizationError(f"a budget of {budget} cannot be: expected a mean SSIM above 0, at most 1")


def combinable(groups: Sequence[Group], attention: AttentionPrecision) -> list[Group]:
    """The groups that a policy may have in FP8 together: AdaLN with FP8 weights, attention as allowed."""
    allowed = [group for group in groups if group.name != ADALN_BOTH]
    return [group for group in allowed if not group.attention or attention is AttentionPrecision.FP8]


def propose(
    groups: Sequence[Group],
    alone: "Mapping[str, Damage]",
    measure: "Callable[[Sequence[Group]], Damage]",
    budget: float,
) -> Proposal:
    """Start from every group in FP8, and take out the worst for its FLOPs until the budget is reached.

    `groups` share no layer; `alone`: group → its damage when it alone is quantized. The order is by
    squared velocity error for each FLOP (the errors of different layers are nearly independent, so that
    their squares add up); AdaLN's weights, of which the FLOPs say nothing, go last, or first when they
    alone miss the budget. Every set is measured whole. Raises QuantizationError, with the best figure,
    when only a model without FP8 reaches the budget.
    """
    order = sorted(groups, key=lambda group: _priority(group, alone[group.name], budget), reverse=True)
    tried: list[float] = []
    best = max((alone[group.name].mean_ssim, group.name) for group in groups)
    for count in range(len(order)):
        kept = tuple(group for group in groups if group not in order[:count])
        damage = measure(kept)
        tried.append(damage.mean_ssim)
        best = max(best, (damage.mean_ssim, ", ".join(group.name for group in kept)))
        if damage.mean_ssim >= budget:
            return Proposal(budget, kept, tuple(order[:count]), damage, tuple(tried))
    raise QuantizationError(
        f"no policy with layers in FP8 reaches a mean SSIM of {budget}: the best that was measured is "
        f"{best[0]:.5f}, with FP8 in nothing but: {best[1]}; lower the budget, or keep the MMDiT in FP16"
    )


def policy_text(proposal: Proposal, alone: "Mapping[str, Damage]", header: Sequence[str]) -> str:
    """The proposal in the form of export/policy.toml; `header` becomes the comment at its top."""
    attention = any(group.attention for group in proposal.kept)
    lines = [*(f"# {line}" for line in header), ""]
    lines += ["[attention]", f'default = "{"fp8" if attention else "fp16"}"']
    for group in (*proposal.kept, *proposal.taken_out):
        damage = alone[group.name]
        reason = f"alone: velocity error {damage.velocity_error:.2%}, mean SSIM {damage.mean_ssim:.5f}"
        kept = group in proposal.kept
        if not kept:
            reason = f"taken out for a mean SSIM of {proposal.budget}; {reason}"
        for pattern, precision in group.rules:
            lines += [
                "",
                "[[rule]]",
                f"group = {json.dumps(group.name)}",
                f"pattern = '{pattern}'",
                f'precision = "{(precision if kept else LayerPrecision.FP16).value}"',
                f"reason = {json.dumps(reason)}",
            ]
    return "\n".join(lines) + "\n"


def policy_header(result: Mapping[str, Any]) -> list[str]:
    """What was measured, as lines of at most 110 characters; `result` as in `sensitivity.json`."""
    found = result["proposal"]
    lines = [
        f"Proposed by the sensitivity study of {result['model']} (pictures: {len(result['prompts'])}, "
        f"steps: {result['steps']}).",
        f"Mean SSIM: {found['mean_ssim']:.5f} measured, {found['budget']} asked. In FP8: "
        f"{found['linear_flops_share']:.1%} of the linear FLOPs, {found['flops_share']:.1%} of all,",
        f"{found['weights_share']:.1%} of the linear layers' weights.",
        f"Taken out: {', '.join(found['taken_out']) or 'nothing'}.",
    ]
    if "mean_ssim_with_attention" in found:
        lines += [
            "Attention's products stay FP16 as in the policy that was given; with them in FP8 too, the mean",
            f"SSIM is {found['mean_ssim_with_attention']:.5f}.",
        ]
    return lines


def _priority(group: Group, damage: "Damage", budget: float) -> tuple[int, float]:
    """What is taken out first has the highest."""
    if group.name == ADALN_WEIGHTS:
        return (1 if damage.mean_ssim < budget else -1, 0.0)
    return (0, damage.velocity_error**2 / max(group.flops, 1))
