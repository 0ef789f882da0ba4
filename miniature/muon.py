"""Muon: momentum, made orthogonal by Newton–Schulz, for the matrices inside a network.

torch.optim.Muon does the same in BF16, one matrix at a time; on a CPU without BF16 units that takes
longer than the training step. Here matrices of one shape go together, in FP32.
Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay; all parameters are matrices.

    Without decay the matrices grow with every step, and FP16 and FP8 pay for it.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Move every parameter against its orthogonalized momentum."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(momentum, group["momentum"])
                shapes[parameter.shape].append((parameter, direction))
            for (rows, columns), pairs in shapes.items():
                updates = orthogonalized(torch.stack([direction for _, direction in pairs]))
                scale = max(1.0, rows / columns) ** 0.5
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """[N, rows, columns] with all singular values brought near 1, by Newton–Schulz."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, b * gram + c * gram @ gram, x, beta=a)
    return x.transpose(1, 2) if tall else x
