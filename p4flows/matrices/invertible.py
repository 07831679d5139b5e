"""InvertibleMatrix: P4Inv, with the inverse and the log-determinant kept at hand (2.2–2.4)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from p4flows.arguments import check_positive_int
from p4flows.linalg import (
    inverse_small,
    log_singular_values,
    refine_inverse,
    residual,
    slogdet_small,
)
from p4flows.matrices.additive import Additive
from p4flows.matrices.bounds import MergeBounds
from p4flows.matrices.perturbation import Perturbation, needs_plain_operations
from p4flows.matrices.perturbed import Draw, PerturbedMatrix
from p4flows.matrices.relative import Relative

_PERTURBATIONS: dict[str, Perturbation] = {kind.name: kind for kind in (Relative(), Additive())}


def default_rank(size: int) -> int:
    """The rank at which training learned most in a second: n up to 64, 8√n beyond.

    At rank n one basis of directions is all there is, and Adam's state survives every merge; the
    thin products of rank 8√n cost less the larger n is (benchmarks/learning.py).

    Args:
        size: n.

    Returns:
        The rank.

    Example:
        >>> [default_rank(n) for n in (2, 63, 255, 1023)]
        [2, 63, 128, 256]
    """
    return min(size, round(8 * math.sqrt(size)))


class InvertibleMatrix(PerturbedMatrix):
    """Invertible matrices with rank-k perturbations (P4Inv, Sections 2.2–2.4).

    The inverse and the log-determinant of A are stored beside it. Reading Ã, its inverse and its
    determinant goes through the Woodbury identity and the determinant lemma (equations 3 and 4),
    and so does a merge: O(n²k). Only `correct` costs O(n³).

    Two perturbations are known:

    - "relative": Ã = (I + u vᵀ) A. u sees the relative gradient (∂J/∂A)Aᵀ, which does not depend on
      the scale or condition of A; v is not trained, but dealt from a random orthogonal basis, and
      at rank n is that basis for good. Neither Ã x nor ln|det Ã| needs A⁻¹.
    - "additive": Ã = A + u vᵀ, u and v trained (the paper). It can cross det A = 0.

    Args:
        size: n.
        batch_shape: a batch of independent matrices.
        rank: number k of columns of u and v; None is n up to 64 and 8√n beyond, 1 is the paper.
        init: "identity", "reverse" (A_ij = δ_i(n−j)) or a tensor of shape `(n, n)` or
            `(*batch_shape, n, n)`, which then gives dtype and device.
        bounds: when a merge is accepted.
        perturbation: "relative" or "additive" (the paper).

    Attributes:
        perturbation: as given.
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
        rank: int | None = None,
        init: str | Tensor = "identity",
        bounds: MergeBounds = MergeBounds(),
        perturbation: Literal["relative", "additive"] = "relative",
    ) -> None:
        if not isinstance(bounds, MergeBounds):
            raise TypeError(f"bounds must be MergeBounds, got {type(bounds).__name__}")
        if perturbation not in _PERTURBATIONS:
            raise ValueError(f"perturbation must be 'relative' or 'additive', got {perturbation!r}")
        check_positive_int("size", size)
        self.perturbation = perturbation
        super().__init__(size, batch_shape, default_rank(size) if rank is None else rank, init)
        self.bounds = bounds
        self.v.requires_grad_(self._kind.trains_v)
        self._version = self._kind.layout_version

    @property
    def _kind(self) -> Perturbation:
        return _PERTURBATIONS[self.perturbation]

    @property
    def _first_draw(self) -> Draw:
        return self._kind.first_draw

    @property
    def _scale(self) -> float:
        return self._kind.scale(self.size)

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
        return self._kind.multiply(x, bias, self.u, self.v, self.frozen)

    def solve(self, y: Tensor) -> Tensor:
        """Ã⁻¹ y for rows y, by the Sherman–Morrison–Woodbury identity (equation 3).

        Args:
            y: shape `(*batch_shape, N, n)`.

        Returns:
            Tensor of the shape of y. Cost O(n²N).
        """
        return self._kind.solve(y, self.u, self.v, self.inverse_frozen)

    def multiply_and_logabsdet(
        self, x: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ã x + bias and ln|det Ã| for rows x, with hand-written gradients."""
        if needs_plain_operations(x):
            return super().multiply_and_logabsdet(x, bias)
        return self._kind.multiply_and_logabsdet(
            x, bias, self.u, self.v, self.frozen, *self._inverse_and_logabsdet()
        )

    def solve_and_logabsdet(self, y: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ã⁻¹ (y − bias) and −ln|det Ã| for rows y, with hand-written gradients."""
        if needs_plain_operations(y):
            return super().solve_and_logabsdet(y, bias)
        return self._kind.solve_and_logabsdet(
            y, bias, self.u, self.v, *self._inverse_and_logabsdet()
        )

    def _inverse_and_logabsdet(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inverse_frozen, self.logabsdet_frozen, self.logabsdet_carry

    def capacitance(self) -> Tensor:
        """G with det Ã = det G · det A (equation 4), shape `(*batch_shape, k, k)`, in O(n²k)."""
        return self._kind.capacitance(self.inverse_frozen, self.u, self.v)

    def right_factor(self) -> Tensor:
        """V with Ã = A + u Vᵀ, shape `(*batch_shape, n, k)`, in O(n²k)."""
        return self._kind.right_factor(self.frozen, self.v)

    def inverse_factors(self) -> tuple[Tensor, Tensor]:
        """W and Z with Ã⁻¹ = A⁻¹ − W Zᵀ, shape `(*batch_shape, n, k)`, in O(n²k)."""
        w, z = self._kind.inverse_factors(self.inverse_frozen, self.u, self.v)
        return w @ inverse_small(self.capacitance()), z

    def dense(self) -> Tensor:
        """Ã = A + u Vᵀ (equation 5), shape `(*batch_shape, n, n)`."""
        return self.frozen + self.u @ self.right_factor().mT

    def inverse(self) -> Tensor:
        """Ã⁻¹ (equation 3), shape `(*batch_shape, n, n)`."""
        w, z = self.inverse_factors()
        return self.inverse_frozen - w @ z.mT

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Sign and log absolute determinant of Ã (equation 4), each of shape `batch_shape`."""
        sign, update = slogdet_small(self.capacitance())
        return self.sign * sign, self.logabsdet_frozen + (self.logabsdet_carry + update)

    def penalty(self) -> Tensor:
        """g(u, v)/C_p of Appendix A, shape `batch_shape`; multiply by a strength of your own."""
        _, update = slogdet_small(self.capacitance())
        return self.bounds.penalty(update, self.logabsdet_frozen + update)

    def _merge(self, candidates: Tensor, force: bool) -> tuple[Tensor, Tensor]:
        """Algorithm 2; in place, without temporaries of the size of A."""
        g, right = self.capacitance(), self.right_factor()
        w, z = self.inverse_factors()
        sign, update = slogdet_small(g)
        sane = self.bounds.accept(log_singular_values(g), self.logabsdet_frozen + update)
        # No entry of the new A and A⁻¹ can exceed these sums, so finite sums are a finite merge. An
        # infinite update is a singular G or one that overflowed.
        size_frozen = _largest(self.frozen) + _largest_product(self.u, right)
        size_inverse = _largest(self.inverse_frozen) + _largest_product(w, z)
        finite = update.isfinite() & size_frozen.isfinite() & size_inverse.isfinite()
        possible = candidates & finite
        merged = possible & (sane | force)

        column = merged[..., None, None]

        def masked(factor: Tensor) -> Tensor:
            return torch.where(column, factor, 0.0).reshape(-1, self.size, self.rank)

        n = self.size
        self.frozen.view(-1, n, n).baddbmm_(masked(self.u), masked(right).mT)
        self.inverse_frozen.view(-1, n, n).baddbmm_(masked(w), masked(z).mT, alpha=-1)
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
        return (*super().layout(), self.bounds, self.perturbation)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        version = local_metadata.get("version")
        for kind in _PERTURBATIONS.values():
            # The tensors are of the same names and shapes, and mean another matrix.
            if kind.layout_version == version and kind.name != self.perturbation:
                raise RuntimeError(
                    f"{prefix.rstrip('.') or type(self).__name__} was saved with "
                    f"perturbation={kind.name!r} and has {self.perturbation!r}: build it with "
                    f"perturbation={kind.name!r} to load it"
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        """Size, batch shape, rank and perturbation, for `repr`."""
        return f"{super().extra_repr()}, perturbation={self.perturbation!r}"


def _largest(matrix: Tensor) -> Tensor:
    """Largest absolute entry of each matrix."""
    return torch.linalg.vector_norm(matrix, ord=math.inf, dim=(-2, -1))


def _largest_product(left: Tensor, right: Tensor) -> Tensor:
    """A bound on the entries of each `left @ right.mT`, without forming it."""
    largest = [torch.linalg.vector_norm(f, ord=math.inf, dim=-2) for f in (left, right)]
    return (largest[0] * largest[1]).sum(-1)
