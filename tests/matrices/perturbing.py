"""Perturbations far from the identity."""

from typing import Any

import torch
from torch import Tensor

from p4flows.matrices import InvertibleMatrix

KINDS = ["relative", "additive"]


@torch.no_grad()
def perturb(matrix: InvertibleMatrix, generator: torch.Generator, scale: float = 0.5) -> None:
    """A random u, so that ‖u vᵀ‖ is about `scale`·√n, and a v that is not the drawn one."""
    for parameter, size in ((matrix.u, scale * matrix.size**-0.5), (matrix.v, 0.1)):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(size * noise)
    matrix.dense()  # what has to follow from another v does so when it is read


def additive(size: int, **arguments: Any) -> InvertibleMatrix:
    """A matrix with the perturbation of the paper, Ã = A + u vᵀ of rank one."""
    return InvertibleMatrix(size, **{"rank": 1, "perturbation": "additive", **arguments})


def set_factors(matrix: InvertibleMatrix, u: Tensor | float, v: Tensor | float) -> None:
    """Overwrite the perturbation, by broadcasting."""
    with torch.no_grad():
        matrix.u.copy_(torch.as_tensor(u, dtype=torch.float64))
        matrix.v.copy_(torch.as_tensor(v, dtype=torch.float64))
