"""InvertibleMatrix: P4Inv, with the inverse and the log-determinant kept at hand (2.2–2.4)."""

import dataclasses
import math
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from p4flows.linalg import (
    capacitance,
    inverse_small,
    multiply_transposed,
    refine_inverse,
    residual,
    slogdet_small,
)
from p4flows.matrices.invertible_autograd import Multiply, Solve, needs_plain_operations
from p4flows.matrices.perturbed import PerturbedMatrix

Interval = tuple[float, float]
_UNBOUNDED: Interval = (-math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class MergeBounds:
    """When a merge is accepted and where the penalty starts (paper, Appendix A).

    With G = I + vᵀA⁻¹u, a merge multiplies det A by det G. Each field is an interval (low, high).

    Args:
        update: bounds on ln|det G|, C⁽⁰⁾ in the paper.
        logabsdet: bounds on ln|det G · det A|, C⁽¹⁾ in the paper.
        penalty_update: the penalty is zero while ln|det G| is inside.
        penalty_logabsdet: the penalty is zero while ln|det G · det A| is inside.

    The default bounds the change and leaves the determinant itself free: absolute bounds on
    ln|det A| forbid ordinary scaling in high dimensions (2·I₃₂ has 22, beyond the paper's 15.5).

    Raises:
        TypeError: when an interval is not a pair of numbers.
        ValueError: when low is not below high.

    Example:
        >>> MergeBounds.paper().logabsdet
        (-2.5, 15.5)
        >>> MergeBounds(update=(-4.0, 4.0)).logabsdet
        (-inf, inf)
    """

    update: Interval = (-6.0, 6.0)
    logabsdet: Interval = _UNBOUNDED
    penalty_update: Interval = (-2.0, 6.0)
    penalty_logabsdet: Interval = _UNBOUNDED

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            interval = getattr(self, field.name)
            if (
                not isinstance(interval, tuple)
                or len(interval) != 2
                or not all(isinstance(bound, int | float) for bound in interval)
            ):
                raise TypeError(f"{field.name} must be a pair of numbers, got {interval!r}")
            if not interval[0] < interval[1]:
                raise ValueError(f"{field.name} must have low < high, got {interval}")

    @classmethod
    def paper(cls) -> Self:
        """The constants of Appendix A."""
        return cls(
            update=(-6.0, math.inf),
            logabsdet=(-2.5, 15.5),
            penalty_update=(-2.0, 15.0),
            penalty_logabsdet=(-2.0, 15.0),
        )

    def accept(self, update: Tensor, logabsdet: Tensor) -> Tensor:
        """Where ln|det G| and ln|det G · det A| are both inside their bounds."""
        return (
            (self.update[0] <= update)
            & (update <= self.update[1])
            & (self.logabsdet[0] <= logabsdet)
            & (logabsdet <= self.logabsdet[1])
        )

    def penalty(self, update: Tensor, logabsdet: Tensor) -> Tensor:
        """g(u, v)/C_p of Appendix A: squared distances to the penalty intervals."""
        outside = (
            update - update.clamp(*self.penalty_update),
            logabsdet - logabsdet.clamp(*self.penalty_logabsdet),
        )
        return outside[0].square() + outside[1].square()


class InvertibleMatrix(PerturbedMatrix):
    """Invertible matrices with rank-k perturbations Ã = A + u vᵀ (P4Inv, Sections 2.2–2.4).

    The inverse and the log-determinant of A are stored beside it. Reading Ã, its inverse and its
    determinant goes through the Woodbury identity and the determinant lemma (equations 3 and 4),
    and so does a merge: O(n²k). Only `correct` costs O(n³).

    Args:
        size: n.
        batch_shape: a batch of independent matrices.
        rank: number k of columns of u and v; 1 is the paper.
        init: "identity", "reverse" (A_ij = δ_i(n−j)) or a tensor of shape `(n, n)` or
            `(*batch_shape, n, n)`, which then gives dtype and device.
        bounds: when a merge is accepted.

    Attributes:
        frozen: buffer, A, shape `(*batch_shape, n, n)`.
        inverse_frozen: buffer, A⁻¹.
        sign: buffer, sign of det A, shape `batch_shape`.
        logabsdet_frozen: buffer, ln|det A|, shape `batch_shape`.
        logabsdet_carry: buffer, what rounding cut off `logabsdet_frozen` (compensated summation:
            thousands of merges would otherwise add up their roundings).

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the size or rank is out of range, or init is of another shape, not finite
            or singular to working precision.

    Example:
        >>> matrix = InvertibleMatrix(3)
        >>> with torch.no_grad():
        ...     _ = matrix.u.fill_(0.1)
        >>> before = matrix.dense()
        >>> matrix.merge().item(), torch.allclose(matrix.frozen, before)
        (True, True)
        >>> torch.allclose(matrix.inverse() @ before, torch.eye(3), atol=1e-5)
        True
    """

    inverse_frozen: Tensor
    sign: Tensor
    logabsdet_frozen: Tensor
    logabsdet_carry: Tensor

    def __init__(
        self,
        size: int,
        *,
        batch_shape: tuple[int, ...] = (),
        rank: int = 1,
        init: str | Tensor = "identity",
        bounds: MergeBounds = MergeBounds(),
    ) -> None:
        if not isinstance(bounds, MergeBounds):
            raise TypeError(f"bounds must be MergeBounds, got {type(bounds).__name__}")
        super().__init__(size, batch_shape, rank, init)
        self.bounds = bounds

    def _state_of(self, matrix: Tensor) -> dict[str, Tensor]:
        """A with its inverse and log-determinant, computed once in float64."""
        wide = matrix.double()
        inverse = torch.linalg.inv_ex(wide).inverse
        sign, logabsdet = torch.linalg.slogdet(wide)
        condition = torch.linalg.matrix_norm(wide, 1) * torch.linalg.matrix_norm(inverse, 1)
        # Written so that NaN, the condition number of an exactly singular matrix, is refused too.
        if not bool((condition < 1.0 / torch.finfo(matrix.dtype).eps).all()):
            raise ValueError(
                f"init must be invertible, got a matrix that is singular to working precision "
                f"(condition number {condition.max().item():.1e} in {matrix.dtype})"
            )
        derived = {
            "inverse_frozen": inverse,
            "sign": sign,
            "logabsdet_frozen": logabsdet,
            "logabsdet_carry": torch.zeros_like(logabsdet),
        }
        return {"frozen": matrix} | {name: x.to(matrix.dtype) for name, x in derived.items()}

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Ã x + bias for rows x (Appendix B): no n × n matrix is formed or differentiated.

        Args:
            x: shape `(*batch_shape, N, n)`.
            bias: shape `(*batch_shape, n)` or None.

        Returns:
            Tensor of the shape of x. Cost O(n²N).
        """
        if self.batch_shape:
            y = x @ self.frozen.mT
            y = y if bias is None else y + bias.unsqueeze(-2)
            return y + (x @ self.v) @ self.u.mT
        return torch.addmm(F.linear(x, self.frozen, bias), x @ self.v, self.u.mT)

    def solve(self, y: Tensor) -> Tensor:
        """Ã⁻¹ y for rows y, by the Sherman–Morrison–Woodbury identity (equation 3).

        Args:
            y: shape `(*batch_shape, N, n)`.

        Returns:
            Tensor of the shape of y. Cost O(n²N).
        """
        w, g = capacitance(self.inverse_frozen, self.u, self.v)
        x = y @ self.inverse_frozen.mT
        return x - (x @ self.v) @ (w @ inverse_small(g)).mT

    def multiply_and_logabsdet(
        self, x: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ã x + bias and ln|det Ã| for rows x, with hand-written gradients."""
        if needs_plain_operations(x):
            return super().multiply_and_logabsdet(x, bias)
        return Multiply.apply(  # type: ignore[no-untyped-call]
            x, bias, self.u, self.v, self.frozen, *self._inverse_and_logabsdet()
        )

    def solve_and_logabsdet(self, y: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ã⁻¹ (y − bias) and −ln|det Ã| for rows y, with hand-written gradients."""
        if needs_plain_operations(y):
            return super().solve_and_logabsdet(y, bias)
        return Solve.apply(  # type: ignore[no-untyped-call]
            y, bias, self.u, self.v, *self._inverse_and_logabsdet()
        )

    def _inverse_and_logabsdet(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inverse_frozen, self.logabsdet_frozen, self.logabsdet_carry

    def dense(self) -> Tensor:
        """Ã = A + u vᵀ (equation 5), shape `(*batch_shape, n, n)`."""
        return self.frozen + self.u @ self.v.mT

    def inverse(self) -> Tensor:
        """Ã⁻¹ (equation 3), shape `(*batch_shape, n, n)`."""
        w, g = capacitance(self.inverse_frozen, self.u, self.v)
        return self.inverse_frozen - (w @ inverse_small(g)) @ (self.v.mT @ self.inverse_frozen)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Sign and log absolute determinant of Ã (equation 4), each of shape `batch_shape`."""
        sign, update = slogdet_small(capacitance(self.inverse_frozen, self.u, self.v)[1])
        return self.sign * sign, self.logabsdet_frozen + (self.logabsdet_carry + update)

    def penalty(self) -> Tensor:
        """g(u, v)/C_p of Appendix A, shape `batch_shape`; multiply by a strength of your own."""
        _, update = slogdet_small(capacitance(self.inverse_frozen, self.u, self.v)[1])
        return self.bounds.penalty(update, self.logabsdet_frozen + update)

    def _merge(self, candidates: Tensor, force: bool) -> tuple[Tensor, Tensor]:
        """Algorithm 2; in place, without temporaries of the size of A."""
        w, g = capacitance(self.inverse_frozen, self.u, self.v)
        z = multiply_transposed(self.inverse_frozen, self.v)
        w_scaled = w @ inverse_small(g)
        sign, update = slogdet_small(g)
        sane = self.bounds.accept(update, self.logabsdet_frozen + update)
        # No entry of the new A and A⁻¹ can exceed these sums, so finite sums are a finite merge. An
        # infinite update is a singular G or one that overflowed.
        size_frozen = _largest(self.frozen) + _largest_product(self.u, self.v)
        size_inverse = _largest(self.inverse_frozen) + _largest_product(w_scaled, z)
        finite = update.isfinite() & size_frozen.isfinite() & size_inverse.isfinite()
        possible = candidates & finite
        merged = possible & (sane | force)

        column = merged[..., None, None]

        def masked(factor: Tensor) -> Tensor:
            return torch.where(column, factor, 0.0).reshape(-1, self.size, self.rank)

        n = self.size
        self.frozen.view(-1, n, n).baddbmm_(masked(self.u), masked(self.v).mT)
        self.inverse_frozen.view(-1, n, n).baddbmm_(masked(w_scaled), masked(z).mT, alpha=-1)
        self.sign.mul_(torch.where(merged, sign, 1.0))
        self._add_to_logabsdet(torch.where(merged, update, 0.0))
        return merged, merged & ~sane

    def _add_to_logabsdet(self, increment: Tensor) -> None:
        """Kahan's compensated sum: what one addition rounds off takes part in the next."""
        old = self.logabsdet_frozen.clone()
        increment = increment + self.logabsdet_carry
        self.logabsdet_frozen.add_(increment)
        taken = self.logabsdet_frozen - old
        self.logabsdet_carry.copy_((old - (self.logabsdet_frozen - taken)) + (increment - taken))

    @torch.no_grad()
    def correct(self) -> Tensor:
        """Refresh the stored inverse by iterative inversion and the log-determinant with it.

        Two steps of order 3 (Soleymani 2014) leave the residual to the power of nine for six matrix
        products; all orders end at the same rounding, these get there from furthest for their cost.
        An inverse too far off for the two steps to finish is rebuilt by LU in float64.

        Returns:
            Boolean tensor of shape `batch_shape`: inverses that were rebuilt. Cost O(n³).
        """
        error = residual(self.frozen, self.inverse_frozen)
        # Two steps leave the residual R⁹, which has to be rounding; so that NaN counts as lost.
        lost = ~(torch.linalg.matrix_norm(error) < torch.finfo(error.dtype).eps ** (1 / 9))
        refined = refine_inverse(self.inverse_frozen, error)
        refined = refine_inverse(refined, residual(self.frozen, refined))
        rescued = torch.zeros_like(lost)
        if bool(lost.any()):
            rebuilt = torch.linalg.inv_ex(self.frozen.double()).inverse.to(self.frozen.dtype)
            rescued = lost & rebuilt.isfinite().flatten(-2).all(-1)
            refined = torch.where(rescued[..., None, None], rebuilt, refined)
        keep = refined.isfinite().flatten(-2).all(-1) & (~lost | rescued)
        self.inverse_frozen.copy_(torch.where(keep[..., None, None], refined, self.inverse_frozen))
        self._refresh_slogdet()
        return rescued

    def _refresh_slogdet(self) -> None:
        """Take sign and log-determinant from A again, where A is not singular.

        Each merge adds ln|det G| with an error of about eps·cond(A), which nothing later undoes:
        a path through the singular matrices leaves an offset for good. Corrections are rare and
        O(n³) anyway, so a factorisation ends the drift here and costs a training step nothing.
        """
        wide_sign, wide = torch.linalg.slogdet(self.frozen.double())
        regular = wide.isfinite() & (wide_sign != 0)
        logabsdet = wide.to(self.frozen.dtype)
        carry = (wide - logabsdet.double()).to(self.frozen.dtype)
        self.sign.copy_(torch.where(regular, wide_sign.to(self.sign.dtype), self.sign))
        self.logabsdet_frozen.copy_(torch.where(regular, logabsdet, self.logabsdet_frozen))
        self.logabsdet_carry.copy_(torch.where(regular, carry, self.logabsdet_carry))

    def layout(self) -> tuple[Any, ...]:
        """What two matrices must have in common to be stacked."""
        return (*super().layout(), self.bounds)


def _largest(matrix: Tensor) -> Tensor:
    """Largest absolute entry of each matrix."""
    return torch.linalg.vector_norm(matrix, ord=math.inf, dim=(-2, -1))


def _largest_product(left: Tensor, right: Tensor) -> Tensor:
    """A bound on the entries of each `left @ right.mT`, without forming it."""
    largest = [torch.linalg.vector_norm(f, ord=math.inf, dim=-2) for f in (left, right)]
    return (largest[0] * largest[1]).sum(-1)
