"""How far the state that a perturbed matrix stores is from the frozen matrix itself."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from p4flows.matrices.linear_algebra import residual

# LAPACK's own tests of inverses pass below it.
RATIO = 30.0

# The log-determinant sums the errors of the merges since the last correction; so many times the
# n·eps·cond of one is what a million merges at n = 2 and at 64 stay below (benchmarks/stress.py).
LOGABSDET = 8.0
# From a condition number of so much over eps on, a round trip keeps less than one digit.
CONDITION_EPS = 0.1


class MatrixError(NamedTuple):
    """Errors of a stored inverse X and log-determinant of A, computed in float64.

    Each field is a tensor of the matrices' `batch_shape`; `worst` reduces it to one matrix.

    Attributes:
        right: largest entry of |A X − I|.
        left: largest entry of |X A − I|.
        ratio: LAPACK's test ratio ‖I − A X‖₁ / (n·eps·‖A‖₁·‖X‖₁), the larger one of both sides;
            below one for an inverse that is right to rounding, at any condition.
        logabsdet: |ln|det A| − what is stored|, in nats.
        wrong_sign: whether the stored sign is not that of det A.
        condition: ‖A‖₁·‖A⁻¹‖₁ with A⁻¹ by LU; infinite for a singular matrix.

    Example:
        >>> from p4flows import InvertibleMatrix
        >>> error = InvertibleMatrix(3, init=2 * torch.eye(3)).error()
        >>> error.condition.item(), error.ratio.item(), error.wrong_sign.item()
        (1.0, 0.0, False)
    """

    right: Tensor
    left: Tensor
    ratio: Tensor
    logabsdet: Tensor
    wrong_sign: Tensor
    condition: Tensor

    def is_right(self, size: int, dtype: torch.dtype) -> Tensor:
        """Where what is stored is off by no more than rounding in a dtype explains.

        Args:
            size: n.
            dtype: in which it is stored.

        Returns:
            Boolean tensor: ratio ≤ 30, where LAPACK's own tests pass; |Δ ln|det A|| ≤
            8·n·eps·cond, or 100·eps where that is more; and the right sign. False where a field
            is NaN.
        """
        terms = LOGABSDET * size * self.condition
        allowed = torch.finfo(dtype).eps * terms.clamp(min=100.0)
        # |ln|det A|| may be 700 for each dimension, and float64 rounds it by its size.
        allowed = allowed + size * 1e3 * torch.finfo(torch.float64).eps
        return (self.ratio <= RATIO) & (self.logabsdet <= allowed) & ~self.wrong_sign

    def worst(self) -> Self:
        """The largest of each field over the batch, NaN where one is; scalars."""
        return type(self)(*(field.flatten().amax() for field in self))


@torch.no_grad()
def error_of_state(matrix: Tensor, inverse: Tensor, sign: Tensor, logabsdet: Tensor) -> MatrixError:
    """Compare what is stored beside A with A.

    Args:
        matrix: A, shape `(*batch, n, n)`.
        inverse: X, same shape.
        sign: stored sign of det A, shape `batch`.
        logabsdet: stored ln|det A|, shape `batch`; float64 where more digits are kept.

    Returns:
        A `MatrixError` of float64 tensors. Cost O(n³).
    """
    a, x = matrix.double(), inverse.double()
    right, left = residual(a, x), residual(x, a)
    rounding = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    scale = rounding * torch.linalg.matrix_norm(a, 1) * torch.linalg.matrix_norm(x, 1)
    larger = torch.maximum(torch.linalg.matrix_norm(right, 1), torch.linalg.matrix_norm(left, 1))
    true_sign, true_logabsdet = torch.linalg.slogdet(a)
    true_inverse, info = torch.linalg.inv_ex(a)
    condition = torch.linalg.matrix_norm(a, 1) * torch.linalg.matrix_norm(true_inverse, 1)
    return MatrixError(
        right=right.abs().amax((-2, -1)),
        left=left.abs().amax((-2, -1)),
        ratio=larger / scale,
        logabsdet=(true_logabsdet - logabsdet.double()).abs(),
        wrong_sign=true_sign != sign.double(),
        condition=torch.where(info == 0, condition, torch.inf),
    )
