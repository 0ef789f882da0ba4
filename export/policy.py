"""The precision policy: which linears of the MMDiT run in FP8, and why the others do not.

The policy is data, `policy.toml`, decided by a layer's role in the block. A user's file of the same form
goes before it. Loads no torch: whether an artifact is up to date depends on the policy.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mmdit.artifact import digest
from mmdit.errors import QuantizationError, first_line
from mmdit.target import KNOWN, known

POLICY = Path(__file__).with_name("policy.toml")
ISLAND = "FP32 island"  # the group of layers inside one


class LayerPrecision(Enum):
    """How a linear layer is stored and run."""

    FP8 = "fp8"  # weights and inputs E4M3: an FP8 matrix product
    FP8_WEIGHTS = "fp8-weights"  # weights stored as E4M3, an FP16 matrix product
    FP16 = "fp16"
    FP32 = "fp32"  # inside an FP32 island


class AttentionPrecision(Enum):
    """How attention's two products run: with q, k, v and softmax in E4M3, or with none of them."""

    FP8 = "fp8"
    FP16 = "fp16"


class Rule(BaseModel):
    """Layers whose names match `pattern` as a whole get `precision`, for `reason`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str
    precision: LayerPrecision
    reason: str = "chosen by hand"
    group: str = "chosen by hand"

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return pattern

    def matches(self, layer: str) -> bool:
        """Whether the rule is about the layer of this name."""
        return re.fullmatch(self.pattern, layer) is not None


class Policy(BaseModel):
    """Rules, the first that matches decides; and attention's precision by target, or "default"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: tuple[Rule, ...] = Field(alias="rule", default=())
    attention: dict[str, AttentionPrecision] = {}

    @field_validator("attention")
    @classmethod
    def _of_known_targets(cls, table: dict[str, AttentionPrecision]) -> dict[str, AttentionPrecision]:
        if unknown := sorted(name for name in table if name != "default" and not known(name)):
            raise ValueError(
                f"{unknown[0]} is no target: expected default, {', '.join(KNOWN)} or such as sm86"
            )
        return table

    def decide(self, layers: Iterable[str]) -> dict[str, Rule]:
        """Layer → the rule that decides its precision.

        Raises QuantizationError for a rule that matches none of the layers, or a layer without a rule.
        """
        names = list(layers)
        for rule in self.rules:
            if not any(rule.matches(name) for name in names):
                raise QuantizationError(
                    f"the policy's pattern {rule.pattern!r} matches none of the {len(names)} layers, such as "
                    f"{names[0]}: mend it or take it out"
                )
        decisions = {name: next((r for r in self.rules if r.matches(name)), None) for name in names}
        undecided = [name for name, rule in decisions.items() if rule is None]
        if undecided:
            raise QuantizationError(
                f"no rule of the policy matches {undecided[0]}: end it with a rule for '.*'"
            )
        return {name: rule for name, rule in decisions.items() if rule is not None}

    def attention_on(self, target: str) -> AttentionPrecision:
        """The precision of attention's products on a target."""
        return self.attention.get(target, self.attention.get("default", AttentionPrecision.FP16))


def read_policy(own: Path | None = None) -> Policy:
    """The project's policy, with the rules of the file `own` before it.

    Raises QuantizationError for a file that is no policy.
    """
    policy = _read(POLICY)
    if own is None:
        return policy
    given = _read(own)
    return Policy(rule=(*given.rules, *policy.rules), attention={**policy.attention, **given.attention})


def with_islands(decisions: Mapping[str, Rule], islands: Mapping[str, str]) -> dict[str, Rule]:
    """The decisions with every layer inside an FP32 island in FP32; `islands`: module → why."""
    islanded = dict(decisions)
    for name in decisions:
        for module, reason in islands.items():
            if name == module or name.startswith(f"{module}.") or not module:
                islanded[name] = Rule(
                    pattern=re.escape(name), precision=LayerPrecision.FP32, reason=reason, group=ISLAND
                )
    return islanded


def fp32_layers(decisions: Mapping[str, Rule]) -> dict[str, str]:
    """The layers that a rule of the policy has in FP32, outside the scan's islands; layer → why."""
    return {
        name: rule.reason
        for name, rule in decisions.items()
        if rule.precision is LayerPrecision.FP32 and rule.group != ISLAND
    }


def attention_in_island(module: str, decisions: Mapping[str, Rule]) -> bool:
    """Whether an attention module lies in an FP32 island: its products are then not quantized."""
    return decisions[f"{module}.to_q"].precision is LayerPrecision.FP32


def calibrated_layers(decisions: Mapping[str, Rule]) -> list[str]:
    """The layers whose inputs the policy quantizes, sorted."""
    return sorted(name for name, rule in decisions.items() if rule.precision is LayerPrecision.FP8)


def calibration_digest(decisions: Mapping[str, Rule], attention: AttentionPrecision) -> str:
    """The SHA-256 of what of a policy a calibration depends on: the quantizers whose ranges it measures."""
    return digest([calibrated_layers(decisions), attention.value])


def _read(path: Path) -> Policy:
    try:
        return Policy.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise QuantizationError(f"the policy {path} cannot be read ({first_line(error)})") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise QuantizationError(
            f"the policy {path}: {place} is {wrong['input']!r}: {wrong['msg']}; "
            "export/policy.toml shows the form"
        ) from None
