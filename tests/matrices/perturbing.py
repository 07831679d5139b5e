"""Perturbations far from the identity, and how far a matrix is from torch.linalg."""

from typing import Any, NamedTuple

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


def additive(size: int, **arguments: Any) -> InvertibleMatrix:
    """A matrix with the perturbation of the paper, Ã = A + u vᵀ of rank one."""
    return InvertibleMatrix(size, **{"rank": 1, "perturbation": "additive", **arguments})


class Error(NamedTuple):
    """Of the stored state against torch.linalg in float64, the largest of a batch."""

    inverse: float
    logabsdet: float
    sign: bool


@torch.no_grad()
def error_of(matrix: InvertibleMatrix) -> Error:
    """The largest entry of |A X − I|, |Δ ln|det A||, and whether the sign is wrong."""
    a, x = matrix.frozen.double(), matrix.inverse_frozen.double()
    sign, logabsdet = torch.linalg.slogdet(a)
    identity = torch.eye(matrix.size, dtype=a.dtype)
    return Error(
        inverse=(a @ x - identity).abs().max().item(),
        logabsdet=(logabsdet - matrix.logabsdet_frozen).abs().max().item(),
        sign=not torch.equal(sign, matrix.sign.double()),
    )


def set_factors(matrix: InvertibleMatrix, u: Tensor | float, v: Tensor | float) -> None:
    """Overwrite the perturbation, by broadcasting."""
    with torch.no_grad():
        matrix.u.copy_(torch.as_tensor(u, dtype=torch.float64))
        matrix.v.copy_(torch.as_tensor(v, dtype=torch.float64))
