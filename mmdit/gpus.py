"""Known GPUs: what the planner and the roofline reckon with. Dense peaks, as NVIDIA's datasheets state them.

Products in FP16 and FP8 accumulate in FP32, where a datasheet tells the two apart (GeForce halves its rate).
Boards reach these figures at their boost clock; what a long run reaches is lower.
"""

from dataclasses import dataclass

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU model. `memory` in bytes, as NVML reports it (rounded down); `bandwidth` in bytes a second.

    `fp16` and `fp8` are FLOP/s of dense matrix products.
    """

    name: str
    target: str
    memory: int
    bandwidth: float
    fp16: float
    fp8: float
    nvml: str  # the driver's name for it


CARDS = (
    Card("H100 80 GB", "hopper", 79 * GIB, 3352 * GB, 989.4e12, 1978.9e12, "NVIDIA H100 80GB HBM3"),
    Card("H200", "hopper", 140 * GIB, 4800 * GB, 989.4e12, 1978.9e12, "NVIDIA H200"),
    Card("L40S", "ada", 44 * GIB, 864 * GB, 362.1e12, 733e12, "NVIDIA L40S"),
    Card("L4", "ada", 22 * GIB, 300 * GB, 121e12, 242.5e12, "NVIDIA L4"),
    Card("RTX 4090", "ada", 23 * GIB, 1008 * GB, 165.2e12, 330.3e12, "NVIDIA GeForce RTX 4090"),
    Card("RTX 6000 Ada", "ada", 47 * GIB, 960 * GB, 364.2e12, 728.5e12, "NVIDIA RTX 6000 Ada Generation"),
)


def card_named(name: str) -> Card | None:
    """The known GPU that the driver calls by `name`; None for another, such as a laptop's of like name."""
    return next((card for card in CARDS if card.nvml == name), None)
