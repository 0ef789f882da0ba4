"""FP32 islands: a submodule that computes in FP32 inside an FP16 graph, between two casts."""

from typing import Any

import torch
from torch import Tensor, nn


def make_island(module: nn.Module, surrounding: torch.dtype) -> None:
    """Let `module` compute in FP32, in place; `surrounding` is the dtype of what goes in and comes out.

    Its weights become FP32, also in a file that is traced from it. Tensors of other dtypes (ids, the
    FP32 timestep) pass as they are.
    """
    module.float()

    def cast_up(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        return _cast(given, surrounding, torch.float32), _cast(named, surrounding, torch.float32)

    def cast_down(_: nn.Module, __: Any, output: Any) -> Any:
        return _cast(output, torch.float32, surrounding)

    module.register_forward_pre_hook(cast_up, with_kwargs=True)
    module.register_forward_hook(cast_down)


def _cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """`value` with each tensor of dtype `source` in it cast to `target`."""
    if isinstance(value, Tensor):
        return value.to(target) if value.dtype == source else value
    if isinstance(value, dict):  # transformers' outputs too
        return type(value)(**{name: _cast(entry, source, target) for name, entry in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_cast(entry, source, target) for entry in value)
    return value
