"""What FP16 cannot hold of a component's activations, and the remedies that follow.

Nothing about a model's streams is assumed: a fold of 2^-1 is tried, and whatever falls to a half of what
it was lies on the stream, whatever falls to a quarter is a square of it.
"""

import math
from collections.abc import Iterable

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from export.folding import SMALLEST_NORMAL, Stream, fold, streams, sunk_weights
from export.modules import explicit_attention, fp32_linears
from export.recorder import Call, Key, Recorder, Recording, Seen, name
from export.remedies import LARGEST_POWER, Fold, Island, Remedies

LARGEST = torch.finfo(torch.float16).max
# Other prompts, seeds and sizes go higher than the few that were scanned.
SAFETY = 4.0


class Activation(BaseModel):
    """A tensor of the graph: its largest magnitude, its largest root mean square over calls.

    `subnormal` is the share of its nonzero values below FP16's normal range; `fp16` says that the graph
    holds it in FP16; `falls` by how many powers of two it falls when a stream is folded by one.
    """

    model_config = ConfigDict(frozen=True)

    module: str
    operation: str
    occurrence: int
    amax: float
    rms: float
    subnormal: float
    fp16: bool
    falls: dict[str, int]

    @property
    def name(self) -> str:
        """How it is called in reports."""
        return name((self.module, self.operation, self.occurrence))

    def folded(self, powers: dict[str, int]) -> float:
        """The largest magnitude after folds of stream → power."""
        return self.amax * 2.0 ** -sum(self.falls.get(stream, 0) * power for stream, power in powers.items())


class Scan(BaseModel):
    """A component's activations, and what goes in and out of its submodules ("input" and "output").

    `saturating` are activation functions that FP16's infinities pass through without harm; `sunk` holds,
    for each stream and weight, the share of values that folds of 2^-1, 2^-2, … make subnormal in FP16.
    """

    model_config = ConfigDict(frozen=True)

    activations: tuple[Activation, ...]
    boundaries: tuple[Activation, ...]
    saturating: tuple[str, ...] = ()
    sunk: dict[str, dict[str, list[float]]] = {}

    def overflows(self, powers: dict[str, int] | None = None) -> list[Activation]:
        """What FP16 cannot hold, with the safety factor and after folds; the largest first."""
        found = [a for a in self.activations if not _held(a, powers or {}) and not self._harmless(a, powers)]
        return sorted(found, key=lambda activation: -activation.amax)

    def sinks(self, powers: dict[str, int] | None = None) -> list[Activation]:
        """What lies in FP16's subnormal range as a whole, with the safety factor and after folds."""
        return [
            a for a in self.activations if a.fp16 and 0 < a.folded(powers or {}) < SMALLEST_NORMAL * SAFETY
        ]

    def beyond(self) -> list[Activation]:
        """Inputs and outputs of the component that FP16 cannot hold, which no remedy mends."""
        outermost = min((boundary.module for boundary in self.boundaries), key=len)
        return [a for a in self.boundaries if a.module == outermost and not _held(a, {})]

    def sunk_by(self, stream: str, power: int) -> dict[str, float]:
        """Weight → the share of its values that a fold of 2^-power makes subnormal, where it is any."""
        shares = {weight: by_power[power - 1] for weight, by_power in self.sunk[stream].items()}
        return {weight: share for weight, share in shares.items() if share}

    def _harmless(self, activation: Activation, powers: dict[str, int] | None) -> bool:
        return activation.module in self.saturating and all(
            _held(boundary, powers or {})
            for boundary in self.boundaries
            if boundary.module == activation.module
        )


def _held(activation: Activation, powers: dict[str, int]) -> bool:
    return not activation.fp16 or activation.folded(powers) * SAFETY <= LARGEST


def scan(component: str, module: nn.Module, recording: Recording) -> Scan:
    """Judge a recording of a component's FP32 module, whose last call is run again four times at most.

    Leaves `module` on the meta device, without weights.
    """
    last_call = recording.last_call
    assert last_call is not None
    with explicit_attention(), fp32_linears():
        plain = _record(module, last_call)
        falls: dict[str, dict[Key, int]] = {}
        sunk: dict[str, dict[str, list[float]]] = {}
        for label, stream in streams(component, module).items():
            sunk[label] = sunk_weights(stream)
            falls[label] = _falls(module, last_call, stream, plain)
        module.to("meta").half()
        in_graph = _record(module, last_call.on_meta())

    def activations(kind: str) -> Iterable[Activation]:
        recorded: dict[Key, Seen] = getattr(recording, kind)
        dtypes: dict[Key, Seen] = getattr(in_graph, kind)
        for key, seen in recorded.items():
            yield Activation(
                module=key[0],
                operation=key[1],
                occurrence=key[2],
                amax=seen.amax,
                rms=seen.rms,
                subnormal=seen.subnormal / max(seen.nonzero, 1),
                fp16=key not in dtypes or dtypes[key].dtype == torch.float16,
                falls={label: table[key] for label, table in falls.items() if table.get(key)},
            )

    found = tuple(activations("operations"))
    suspects = {a.module for a in found if not _held(a, {})}
    submodules = dict(module.named_modules())
    return Scan(
        activations=found,
        boundaries=tuple(activations("boundaries")),
        saturating=tuple(
            path
            for path in sorted(suspects)
            if _is_function(path, submodules[path], recording) and saturates(submodules[path])
        ),
        sunk=sunk,
    )


def saturates(function: nn.Module) -> bool:
    """Whether an elementwise function computed in FP16 is right for each of the 63,488 finite FP16 numbers.

    It is when an infinity inside of it stands for a large number in front of a tanh or a sigmoid.
    """
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = numbers[torch.isfinite(numbers)]
    with torch.no_grad():
        half, full = function(numbers).float(), function(numbers.float())
    fits = full.abs() <= LARGEST
    return full.shape == numbers.shape and bool(
        torch.isclose(half[fits], full[fits], rtol=0.01, atol=0.01).all()
    )


def remedies_from_scan(scan: Scan) -> Remedies:
    """The smallest folds that make room on the residual streams, and islands for what is left."""
    powers: dict[str, int] = {}
    folds = []
    for stream in scan.sunk:
        excess = [
            (math.ceil(math.log2(activation.amax * SAFETY / LARGEST) / activation.falls[stream]), activation)
            for activation in scan.overflows()
            if activation.falls.get(stream, 0) > 0
        ]
        if not excess:
            continue
        power, cause = max(excess, key=lambda found: (found[0], found[1].amax))
        powers[stream] = min(power, LARGEST_POWER)
        folds.append(
            Fold(
                stream=stream,
                power=powers[stream],
                magnitude=cause.amax,
                tensor=cause.name,
                reason=_reason(cause.amax) + _subnormal_weights(scan.sunk_by(stream, powers[stream])),
            )
        )
    islands: dict[str, Island] = {}
    for activation in scan.overflows(powers):
        path = _enclosing(activation.module, scan, powers)
        islands.setdefault(
            path,
            Island(
                module=path,
                magnitude=activation.folded(powers),
                tensor=activation.name,
                reason=_reason(activation.folded(powers))
                + (" after the folds" if activation.folded(powers) != activation.amax else ""),
            ),
        )
    outermost = [
        island
        for path, island in islands.items()
        if not any(path != other and (not other or path.startswith(f"{other}.")) for other in islands)
    ]
    return Remedies(folds=tuple(folds), islands=tuple(outermost))


def _enclosing(path: str, scan: Scan, powers: dict[str, int]) -> str:
    """The smallest submodule around `path` whose inputs and outputs FP16 holds; else the whole."""
    held: dict[str, bool] = {}
    for boundary in scan.boundaries:
        held[boundary.module] = held.get(boundary.module, True) and _held(boundary, powers)
    while path and not held.get(path, False):  # a list of modules has no inputs: it never runs
        path = path.rpartition(".")[0]
    return path


def _falls(module: nn.Module, call: Call, stream: Stream, plain: Recording) -> dict[Key, int]:
    fold(module, stream, 1)
    folded = _record(module, call)
    fold(module, stream, -1)
    before = {**plain.operations, **plain.boundaries}
    after = {**folded.operations, **folded.boundaries}
    return {
        key: round(math.log2(seen.amax / after[key].amax))
        for key, seen in before.items()
        if seen.amax and after[key].amax
    }


def _record(module: nn.Module, call: Call) -> Recording:
    with Recorder(module, amax_only=True) as recorder:
        call()
    return recorder.recording


def _is_function(path: str, module: nn.Module, recording: Recording) -> bool:
    """Whether a module has no weights and no submodules, takes one tensor and gives one."""
    boundaries = [key for key in recording.boundaries if key[0] == path]
    return len(boundaries) == 2 and not [*module.children(), *module.parameters()]


def _reason(magnitude: float) -> str:
    return (
        f"reaches {magnitude:.3g}; FP16 ends at {LARGEST:.0f}, and a safety factor of {SAFETY:g} is asked for"
    )


def _subnormal_weights(shares: dict[str, float]) -> str:
    if not shares:
        return ""
    worst = max(shares, key=lambda weight: shares[weight])
    return f"; of {worst} {shares[worst]:.2%} become subnormal, the most of {len(shares)} such weights"
