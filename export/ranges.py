"""What a file's weights hold, found while they are written: nobody reads gigabytes again to know it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdit.errors import EngineError

# Stored type → the integers of its bits, all of them but the sign, and those of the smallest normal number.
_BITS = {
    torch.float16: (torch.int16, 0x7FFF, 0x0400),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x00800000),
    torch.uint8: (torch.uint8, 0x7F, 0x08),  # E4M3's codes
}


@dataclass
class Ranges:
    """The range of one file's weights, tensor by tensor.

    `subnormal` counts the values below the smallest normal number of the type that they are stored in,
    `zeroed` those that became zero in it; each `worst` is (share of a tensor's values, that tensor).
    """

    tensors: int = 0
    values: int = 0
    subnormal: int = 0
    zeroed: int = 0
    largest: tuple[float, str] = (0.0, "")
    worst_subnormal: tuple[float, str] = (0.0, "")
    worst_zeroed: tuple[float, str] = (0.0, "")

    def add(self, name: str, tensor: Tensor, stored: Tensor) -> None:
        """Look at a weight, `tensor` in the module and `stored` in the file; integers are passed over.

        Raises EngineError when it is not finite.
        """
        if stored.dtype not in _BITS:
            return
        integers, unsigned, normal = _BITS[stored.dtype]
        bits = stored.view(integers) & unsigned
        magnitude = float(tensor.abs().max())
        if not math.isfinite(magnitude):
            raise EngineError(
                f"{name}: its largest magnitude is {magnitude}, expected numbers that are finite: is the "
                "checkpoint whole?"
            )
        nonzero = int(bits.count_nonzero())
        subnormal = nonzero - int((bits >= normal).count_nonzero())
        zeroed = int(tensor.count_nonzero()) - nonzero if stored.dtype is torch.uint8 else 0
        self.tensors += 1
        self.values += bits.numel()
        self.subnormal += subnormal
        self.zeroed += zeroed
        count = bits.numel()
        self.largest = max(self.largest, (magnitude, name), key=_figure)
        self.worst_subnormal = max(self.worst_subnormal, (subnormal / count, name), key=_figure)
        self.worst_zeroed = max(self.worst_zeroed, (zeroed / count, name), key=_figure)

    def found(self) -> dict[str, Any]:
        """For the manifest: magnitudes as they are, shares of values."""
        return {
            "tensors": self.tensors,
            "largest": {"magnitude": self.largest[0], "in": self.largest[1]},
            "subnormal": _shares(self.subnormal / max(self.values, 1), self.worst_subnormal),
            "zeroed": _shares(self.zeroed / max(self.values, 1), self.worst_zeroed),
        }


def _figure(worst: tuple[float, str]) -> float:
    return worst[0]


def _shares(share: float, worst: tuple[float, str]) -> dict[str, Any]:
    return {"share": share, "worst": worst[0], "in": worst[1]}
