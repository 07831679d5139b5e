"""Rank-k formulas for batches of matrices, as pure functions.

Matrices have shape `(*batch, n, n)`, their rank-k factors `(*batch, n, k)`.
"""

import functools

import torch
from torch import Tensor


def plus_identity(g: Tensor) -> Tensor:
    """`I + g`."""
    return g + torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)


@functools.lru_cache(maxsize=64)
def identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The identity matrix, made once: not to be written to."""
    # Not a tensor of inference mode, which a later gradient could not go through.
    with torch.inference_mode(False):
        return torch.eye(size, dtype=dtype, device=device)


def add_product(matrix: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """`matrix + alpha·left·right` for factors of few columns and rows, in one pass."""
    if matrix.dim() == 2:
        return torch.addmm(matrix, left, right, alpha=alpha)
    parts = (part.flatten(0, -3) for part in (matrix, left, right))
    return torch.baddbmm(*parts, alpha=alpha).view_as(matrix)


def slogdet_small(g: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and log absolute determinant of k × k matrices, without LU where k = 1."""
    if g.shape[-1] == 1:
        return torch.sign(g[..., 0, 0]), torch.log(torch.abs(g[..., 0, 0]))
    sign, logabsdet = torch.linalg.slogdet(g)
    return sign, logabsdet


def log_singular_values(g: Tensor) -> Tensor:
    """Logarithms of the singular values of k × k matrices; NaN where one is not finite."""
    if g.shape[-1] == 1:
        return torch.log(torch.abs(g[..., 0]))
    finite = g.isfinite().flatten(-2).all(-1)[..., None]
    # LAPACK raises an exception where it meets NaN.
    values = torch.linalg.svdvals(torch.where(finite[..., None], g, 0.0))
    return torch.where(finite, torch.log(values), torch.nan)


def inverse_small(g: Tensor) -> Tensor:
    """Inverse of k × k matrices; a singular one gives non-finite numbers and no exception."""
    if g.shape[-1] == 1:
        return g.reciprocal()
    return torch.linalg.inv_ex(g).inverse


def residual(matrix: Tensor, inverse: Tensor) -> Tensor:
    """How far a stored inverse is from the inverse: `I − A·X`."""
    error = matrix @ inverse
    error.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return error.neg_()


_ROWS_AT_ONCE = 512


def norm_1(matrix: Tensor) -> Tensor:
    """‖A‖₁, the largest sum of absolute entries of a column, in float64."""
    # vector_norm over the first dimension takes seven times as long.
    if matrix.shape[-2] <= _ROWS_AT_ONCE:
        return matrix.abs().sum(-2).amax(-1).double()
    # In parts, so that what is needed beside a large matrix is a fraction of its size.
    parts = [part.abs().sum(-2) for part in matrix.split(_ROWS_AT_ONCE, dim=-2)]
    return torch.stack(parts).sum(0).amax(-1).double()


def newton_schulz(matrix: Tensor) -> Tensor:
    """One step towards the nearest orthogonal matrix (the polar factor), X + X·(I − XᵀX)/2."""
    return matrix + matrix @ residual(matrix.mT, matrix) / 2
