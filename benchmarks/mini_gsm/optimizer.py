"""Muon for the matrices of the transformer: momentum whose singular values are all pushed towards one.

The update of a matrix is the orthogonal factor of its momentum, found by five Newton-Schulz steps. Matrices of one
shape are handled as one batch, which on a CPU costs a few per cent of a training step.
"""

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of each matrix of a batch, in bfloat16."""
    first, second, third = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(torch.bfloat16)
    x = x.mT.contiguous() if tall else x
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(torch.bfloat16)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return (x.mT if tall else x).float()


class Muon:
    """Nesterov momentum, orthogonalised, with decoupled weight decay."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, weight_decay: float, beta: float = 0.95) -> None:
        self.rate, self.weight_decay, self.beta = rate, weight_decay, beta
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.momentum = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    def zero_grad(self) -> None:
        for group in self.groups.values():
            for parameter in group:
                parameter.grad = None

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """One update at `factor` times the full rate."""
        rate = self.rate * factor
        for shape, group in self.groups.items():
            gradient = torch.stack([parameter.grad for parameter in group])
            momentum = self.momentum[shape].lerp_(gradient, 1 - self.beta)
            update = orthogonalise(gradient.lerp(momentum, self.beta))
            scale = rate * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - rate * self.weight_decay).add_(change, alpha=-scale)
