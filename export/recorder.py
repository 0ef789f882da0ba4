"""Records the magnitude of everything that a module computes: every operation's output, not only modules'.

Attention scores, a gated product, the cube inside a GELU are results of operations that belong to no
submodule; a forward hook misses them.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from export.folding import SMALLEST_NORMAL
from mmdit.errors import QuantizationError

# (path of the module, operation, how many of that operation came before it in the module's call)
Key = tuple[str, str, int]

# They bring no new values, or none yet.
_NO_VALUES = {"clone", "_to_copy", "_unsafe_view", "detach", "alias", "copy_", "empty", "empty_like"}
# An attention mask's constant is finfo.min of the dtype that it is made in, a FP16 one in a FP16 graph.
_MASKED = torch.finfo(torch.float32).min / 2


@dataclass
class Seen:
    """What was seen of a tensor: `amax` and `rms` are the largest of all calls, the counts their sums.

    `dtype` is the last call's.
    """

    amax: float = 0.0
    rms: float = 0.0
    nonzero: int = 0
    subnormal: int = 0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Call:
    """A call of the outermost module that ran, to be run again."""

    module: nn.Module
    given: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self) -> Any:
        with torch.no_grad():
            return self.module(*self.given, **self.named)

    def on_meta(self) -> "Call":
        """The same call on the meta device, its floating-point tensors in FP16."""
        return Call(self.module, _on_meta(self.given), _on_meta(self.named))


@dataclass
class Recording:
    """By operation what it gave, and by module what went in and came out ("input" and "output")."""

    operations: dict[Key, Seen] = field(default_factory=dict)
    boundaries: dict[Key, Seen] = field(default_factory=dict)
    last_call: Call | None = None


class Recorder(TorchDispatchMode):
    """Records every call of a module, or of its submodules, while it is active: `with Recorder(m) as r`.

    `amax_only` leaves the other statistics out. On the meta device it records the dtypes alone. Raises
    QuantizationError when a value is not finite.
    """

    def __init__(self, module: nn.Module, amax_only: bool = False) -> None:
        super().__init__()
        self._amax_only = amax_only
        self.recording = Recording()
        self._module = module
        self._stack: list[tuple[str, Counter[str]]] = []
        self._hooks: list[Any] = []
        self._measuring = False  # in a hook the mode is active, and would see the recorder's own operations

    def __enter__(self) -> "Recorder":
        for path, module in self._module.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._entering(path), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leaving))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _entering(self, path: str) -> Any:
        def enter(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if not self._stack:
                self.recording.last_call = Call(module, given, named)
            self._stack.append((path, Counter()))
            self._record_boundary("input", (given, named))

        return enter

    def _leaving(self, _: nn.Module, __: Any, output: Any) -> None:
        self._record_boundary("output", output)
        self._stack.pop()

    def _record_boundary(self, kind: str, values: Any) -> None:
        path = self._stack[-1][0]
        self._measuring = True
        for index, tensor in enumerate(_tensors(values)):
            self._record(self.recording.boundaries, (path, kind, index), tensor)
        self._measuring = False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = operation(*args, **(kwargs or {}))
        kind = operation.overloadpacket.__name__
        if self._stack and not self._measuring and not operation.is_view and kind not in _NO_VALUES:
            path, counter = self._stack[-1]
            # of several outputs the first is the value, the others a gradient's statistics
            tensor = next(_tensors(output), None)
            if tensor is not None:
                self._record(self.recording.operations, (path, kind, counter[kind]), tensor)
                counter[kind] += 1
        return output

    def _record(self, table: dict[Key, Seen], key: Key, tensor: Tensor) -> None:
        seen = table.setdefault(key, Seen())
        seen.dtype = tensor.dtype
        if tensor.is_meta or not tensor.numel():
            return
        lowest, highest = (float(bound) for bound in tensor.aminmax())
        if lowest <= _MASKED:
            tensor = tensor.masked_fill(tensor <= _MASKED, 0)
            lowest = float(tensor.min())
        amax = max(-lowest, highest)
        if not amax < float("inf"):
            raise QuantizationError(
                f"{name(key)} is {amax} in FP32: the checkpoint's weights are damaged, download it again"
            )
        seen.amax = max(seen.amax, amax)
        if table is self.recording.operations and not self._amax_only:
            magnitude = tensor.abs()
            norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
            seen.rms = max(seen.rms, norm / tensor.numel() ** 0.5)
            nonzero = int(magnitude.count_nonzero())
            seen.nonzero += nonzero
            seen.subnormal += nonzero - int((magnitude >= SMALLEST_NORMAL).sum())


def name(key: Key) -> str:
    """How a tensor is called in reports: "encoder.block.1.layer.1.DenseReluDense: mul 1"."""
    path, operation, occurrence = key
    return f"{path or 'the whole module'}: {operation}" + (f" {occurrence}" if occurrence else "")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a value, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _tensors(entry)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta", torch.float16 if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {name: _on_meta(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_on_meta(entry) for entry in value)
    return value
