"""Rank-k formulas for batches of matrices, as pure functions.

Matrices have shape `(*batch, n, n)`, their rank-k factors `(*batch, n, k)`.
"""

import functools

import torch
from torch import Tensor


def plus_identity(g: Tensor) -> Tensor:
    """`I + g`.

    Args:
        g: shape `(*batch, k, k)`.

    Returns:
        A new tensor of the same shape.

    Example:
        >>> plus_identity(torch.ones(2, 2)).tolist()
        [[2.0, 1.0], [1.0, 2.0]]
    """
    return g + torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)


@functools.lru_cache(maxsize=64)
def identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The identity matrix, made once: not to be written to.

    Args:
        size: k.
        dtype: of the matrix.
        device: of the matrix.

    Returns:
        Tensor of shape `(k, k)`.

    Example:
        >>> identity(1, torch.float64, torch.device("cpu")).item()
        1.0
    """
    # Not a tensor of inference mode, which a later gradient could not go through.
    with torch.inference_mode(False):
        return torch.eye(size, dtype=dtype, device=device)


def add_product(matrix: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """`matrix + alpha·left·right` for factors of few columns and rows, in one pass.

    Args:
        matrix: shape `(*batch, n, n)`.
        left: shape `(*batch, n, k)`.
        right: shape `(*batch, k, n)`.
        alpha: a factor.

    Returns:
        A new tensor of shape `(*batch, n, n)`.

    Example:
        >>> add_product(torch.eye(2), torch.ones(2, 1), torch.ones(1, 2), alpha=-1.0).tolist()
        [[0.0, -1.0], [-1.0, 0.0]]
    """
    if matrix.dim() == 2:
        return torch.addmm(matrix, left, right, alpha=alpha)
    parts = (part.flatten(0, -3) for part in (matrix, left, right))
    return torch.baddbmm(*parts, alpha=alpha).view_as(matrix)


def slogdet_small(g: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and log absolute determinant of k × k matrices, without LU where k = 1.

    Args:
        g: shape `(*batch, k, k)`.

    Returns:
        sign and logabsdet of shape `(*batch,)`, as `torch.linalg.slogdet`.

    Example:
        >>> sign, logabsdet = slogdet_small(torch.tensor([[-1.0]]))
        >>> sign.item(), logabsdet.item()
        (-1.0, 0.0)
    """
    if g.shape[-1] == 1:
        return torch.sign(g[..., 0, 0]), torch.log(torch.abs(g[..., 0, 0]))
    sign, logabsdet = torch.linalg.slogdet(g)
    return sign, logabsdet


def log_singular_values(g: Tensor) -> Tensor:
    """Logarithms of the singular values of k × k matrices; NaN where one is not finite.

    Args:
        g: shape `(*batch, k, k)`.

    Returns:
        Tensor of shape `(*batch, k)`.

    Example:
        >>> log_singular_values(torch.tensor([[0.0, -1.0], [1.0, 0.0]])).abs().max().item() < 1e-6
        True
    """
    if g.shape[-1] == 1:
        return torch.log(torch.abs(g[..., 0]))
    finite = g.isfinite().flatten(-2).all(-1)[..., None]
    # LAPACK raises an exception where it meets NaN.
    values = torch.linalg.svdvals(torch.where(finite[..., None], g, 0.0))
    return torch.where(finite, torch.log(values), torch.nan)


def inverse_small(g: Tensor) -> Tensor:
    """Inverse of k × k matrices; a singular one gives non-finite numbers and no exception.

    Args:
        g: shape `(*batch, k, k)`.

    Returns:
        Tensor of the same shape.

    Example:
        >>> inverse_small(torch.tensor([[4.0]])).item()
        0.25
    """
    if g.shape[-1] == 1:
        return g.reciprocal()
    return torch.linalg.inv_ex(g).inverse


def residual(matrix: Tensor, inverse: Tensor) -> Tensor:
    """How far a stored inverse is from the inverse: `I − A·X`.

    Args:
        matrix: A, shape `(*batch, n, n)`.
        inverse: X ≈ A⁻¹, same shape.

    Returns:
        Tensor of the same shape. Cost O(n³).

    Example:
        >>> residual(2 * torch.eye(3), torch.eye(3) / 2).abs().max().item()
        0.0
    """
    error = matrix @ inverse
    error.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return error.neg_()


_ROWS_AT_ONCE = 512


def norm_1(matrix: Tensor) -> Tensor:
    """‖A‖₁, the largest sum of absolute entries of a column, in float64.

    Args:
        matrix: A, shape `(*batch, n, n)`.

    Returns:
        Tensor of shape `batch`.

    Example:
        >>> norm_1(torch.tensor([[1.0, -2.0], [3.0, 1.0]])).item()
        4.0
    """
    # vector_norm over the first dimension takes seven times as long.
    if matrix.shape[-2] <= _ROWS_AT_ONCE:
        return matrix.abs().sum(-2).amax(-1).double()
    # In parts, so that what is needed beside a large matrix is a fraction of its size.
    parts = [part.abs().sum(-2) for part in matrix.split(_ROWS_AT_ONCE, dim=-2)]
    return torch.stack(parts).sum(0).amax(-1).double()


def compact_wy(w: Tensor) -> Tensor:
    """The triangular factor T of a product of Householder reflections, H(w₁)···H(w_m) = I − W T Wᵀ.

    With H(a) = I − 2 a aᵀ/aᵀa, T⁻¹ is the upper triangle of WᵀW with half of its diagonal (Joffrain
    et al., "Accumulating Householder transformations, revisited", 2006).

    Args:
        w: W, one reflection a column, shape `(*batch, n, m)`.

    Returns:
        T of shape `(*batch, m, m)`, upper triangular; not finite where a column is zero. Cost
        O(nm²).

    Example:
        >>> w = torch.tensor([[1.0], [1.0]])
        >>> torch.eye(2) - w @ compact_wy(w) @ w.mT
        tensor([[ 0., -1.],
                [-1.,  0.]])
    """
    gram = w.mT @ w
    halved = gram.triu() - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    identity = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    return torch.linalg.solve_triangular(halved, identity, upper=True)


def newton_schulz(matrix: Tensor) -> Tensor:
    """One step towards the nearest orthogonal matrix (the polar factor), X + X·(I − XᵀX)/2.

    Args:
        matrix: X, shape `(*batch, n, n)`.

    Returns:
        Tensor of the same shape; a small error I − XᵀX becomes ¾ of its square. Cost O(n³).

    Example:
        >>> x = newton_schulz(1.01 * torch.eye(2, dtype=torch.float64))
        >>> bool((x.mT @ x - torch.eye(2)).abs().max() < 4e-4)
        True
    """
    return matrix + matrix @ residual(matrix.mT, matrix) / 2
