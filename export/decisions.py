"""What the policy, the scan's islands and the target together decide about one checkpoint's layers."""

from pathlib import Path

from export.checkpoint import linears
from export.policy import AttentionPrecision, Rule, fp32_layers, read_policy, with_islands
from export.remedies import Island, Remedies
from mmdit.artifact import digest
from mmdit.errors import TargetError
from mmdit.target import KNOWN, find_gpu, known, resolve, tensorrt_version


def decided(
    checkpoint: Path, remedies: Remedies, policy: Path | None, target: str
) -> tuple[dict[str, Rule], AttentionPrecision]:
    """What the policy says about each layer, the scan's FP32 islands put in, and about attention.

    Raises QuantizationError for a policy that does not fit the checkpoint, TargetError for a target that is
    none.
    """
    if target != "auto" and not known(target):
        raise TargetError(f"target {target!r} is unknown: expected auto, {', '.join(KNOWN)} or such as sm86")
    if target == "auto":
        target = resolve(target, find_gpu(), tensorrt_version())[0].name
    chosen = read_policy(policy)
    islands = {
        island.module.removeprefix("model").removeprefix("."): island.reason for island in remedies.islands
    }
    return with_islands(chosen.decide(linears(checkpoint)), islands), chosen.attention_on(target)


def remedied(remedies: Remedies, decisions: dict[str, Rule]) -> Remedies:
    """The scan's remedies of the MMDiT, with an island for each layer that the policy has in FP32."""
    islands = tuple(
        Island(module=f"model.{name}", magnitude=0.0, tensor="the policy", reason=reason)
        for name, reason in fp32_layers(decisions).items()
    )
    return remedies.model_copy(update={"islands": remedies.islands + islands})


def policy_digest(decisions: dict[str, Rule]) -> str:
    """The SHA-256 of every layer's decision, its reason included."""
    return digest([[name, rule.model_dump(mode="json")] for name, rule in decisions.items()])
