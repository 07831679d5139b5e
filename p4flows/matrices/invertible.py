"""InvertibleMatrix: P4Inv, with the inverse and the log-determinant kept at hand (2.2–2.4)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from p4flows.arguments import check_positive_int
from p4flows.matrices.additive import Additive
from p4flows.matrices.bounds import MergeBounds
from p4flows.matrices.linear_algebra import (
    add_product,
    inverse_small,
    log_singular_values,
    norm_1,
    slogdet_small,
)
from p4flows.matrices.merge import Merged, State, probe, probe_tolerance
from p4flows.matrices.perturbation import Perturbation, needs_plain_operations
from p4flows.matrices.perturbed import PerturbedMatrix
from p4flows.matrices.precision import on_rows, without_autocast
from p4flows.matrices.relative import Relative

# A stored inverse further from the right one, relative to it, was of no use.
_LOST = 0.1

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
        init: see `PerturbedMatrix`; invertible.
        bounds: when a merge is accepted.
        perturbation: "relative" or "additive" (the paper).
        device: where; by default that of init, or torch's default device.
        dtype: by default that of init, or torch's default dtype.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(bounds, MergeBounds):
            raise TypeError(f"bounds must be MergeBounds, got {type(bounds).__name__}")
        if perturbation not in _PERTURBATIONS:
            raise ValueError(f"perturbation must be 'relative' or 'additive', got {perturbation!r}")
        check_positive_int("size", size)
        self.perturbation = perturbation
        self.draw = self._kind.draw
        rank = default_rank(size) if rank is None else rank
        super().__init__(size, batch_shape, rank, init, device, dtype)
        self.bounds = bounds
        self.v.requires_grad_(self._kind.trains_v)
        self._version = self._kind.layout_version

    @property
    def _kind(self) -> Perturbation:
        return _PERTURBATIONS[self.perturbation]

    @property
    def _scale(self) -> float:
        return self._kind.scale(self.size)

    def _state_of(self, matrix: Tensor) -> dict[str, Tensor]:
        """A with its inverse and log-determinant, computed once in float64."""
        state = _by_lu(matrix)
        condition = norm_1(matrix) * norm_1(state["inverse_frozen"])
        # Written so that NaN, the condition number of an exactly singular matrix, is refused too.
        if not bool((condition < 1.0 / torch.finfo(matrix.dtype).eps).all()):
            raise ValueError(
                f"init must be invertible, got a matrix that is singular to working precision "
                f"(condition number {condition.max().item():.1e} in {matrix.dtype})"
            )
        return {"frozen": matrix, **state}

    @on_rows
    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Ã x + bias for rows x; see `PerturbedMatrix`."""
        return self._kind.multiply(x, bias, *self.factors(), self.frozen)

    @on_rows
    def solve(self, y: Tensor) -> Tensor:
        """Ã⁻¹ y for rows y, by the Sherman–Morrison–Woodbury identity (equation 3)."""
        return self._kind.solve(y, *self.factors(), self.inverse_frozen)

    @on_rows
    def multiply_and_logabsdet(
        self, x: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ã x + bias and ln|det Ã| for rows x, with hand-written gradients."""
        if self._is_plain(x):
            return super().multiply_and_logabsdet(x, bias)
        return self._kind.multiply_rows(
            x, bias, *self.factors(), self.frozen, *self._inverse_and_logabsdet()
        )

    @on_rows
    def solve_and_logabsdet(self, y: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ã⁻¹ (y − bias) and −ln|det Ã| for rows y, with hand-written gradients."""
        if self._is_plain(y):
            return super().solve_and_logabsdet(y, bias)
        return self._kind.solve_rows(y, bias, *self.factors(), *self._inverse_and_logabsdet())

    def _is_plain(self, rows: Tensor) -> bool:
        """Whether the hand-written gradients, of rows of a single matrix, do not apply."""
        return rows.dim() != 2 or self.frozen.dim() != 2 or needs_plain_operations(rows)

    def _inverse_and_logabsdet(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inverse_frozen, self.logabsdet_frozen, self.logabsdet_carry

    @without_autocast
    def capacitance(self) -> Tensor:
        """G with det Ã = det G · det A (equation 4), shape `(*batch_shape, k, k)`, in O(n²k)."""
        return self._kind.capacitance(self.inverse_frozen, *self.factors())

    @without_autocast
    def right_factor(self) -> Tensor:
        """V with Ã = A + u Vᵀ, shape `(*batch_shape, n, k)`, in O(n²k)."""
        return self._kind.right_factor(self.frozen, self.factors()[1])

    @without_autocast
    def inverse_factors(self) -> tuple[Tensor, Tensor]:
        """W and Z with Ã⁻¹ = A⁻¹ − W Zᵀ, shape `(*batch_shape, n, k)`, in O(n²k)."""
        w, z, g = self._kind.inverse_factors(self.inverse_frozen, *self.factors())
        return w @ inverse_small(g), z

    @without_autocast
    def dense(self) -> Tensor:
        """Ã = A + u Vᵀ (equation 5), shape `(*batch_shape, n, n)`."""
        return self.frozen + self.factors()[0] @ self.right_factor().mT

    @without_autocast
    def inverse(self) -> Tensor:
        """Ã⁻¹ (equation 3), shape `(*batch_shape, n, n)`."""
        w, z = self.inverse_factors()
        return self.inverse_frozen - w @ z.mT

    @without_autocast
    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Sign and log absolute determinant of Ã (equation 4), each of shape `batch_shape`."""
        sign, update = slogdet_small(self.capacitance())
        return self.sign * sign, self.logabsdet_frozen + (self.logabsdet_carry + update)

    @without_autocast
    def penalty(self) -> Tensor:
        """g(u, v)/C_p of Appendix A, shape `batch_shape`; multiply by a strength of your own."""
        _, update = slogdet_small(self.capacitance())
        return self.bounds.penalty(update, self.logabsdet_frozen + update)

    def _merged(self, state: State, candidates: Tensor, force: bool) -> Merged:
        """Algorithm 2, followed by a probe of what it leaves."""
        a, x = state["frozen"], state["inverse_frozen"]
        u, v = state["u"].to(a.dtype), state["v"].to(a.dtype)
        right = self._kind.right_factor(a, v)
        w, z, g = self._kind.inverse_factors(x, u, v)
        w = w @ inverse_small(g)
        sign, update = slogdet_small(g)
        sane = self.bounds.accept(log_singular_values(g), state["logabsdet_frozen"] + update)
        tried = candidates & update.isfinite() & (sane | force)
        column = tried[..., None, None]
        u, right, w, z = (torch.where(column, factor, 0.0) for factor in (u, right, w, z))
        new = {
            "frozen": add_product(a, u, right),
            "inverse_frozen": add_product(x, w, z, alpha=-1.0),
            "sign": state["sign"] * torch.where(tried, sign, 1.0),
            **_add_to_logabsdet(state, torch.where(tried, update, 0.0)),
        }
        off, condition = probe(new["frozen"], new["inverse_frozen"], state["seed"], state["draws"])
        eps = torch.finfo(a.dtype).eps
        # Written so that NaN is doubtful.
        passed = off <= probe_tolerance(self.size) * self.size * eps * condition
        doubtful = tried & ~(passed & (condition < 1.0 / eps))
        corrected = rescued = torch.zeros_like(tried)
        if bool(doubtful.any()):
            corrected, rescued = _settle(state, new, doubtful, condition)
        merged = tried & (~doubtful | corrected)
        return Merged(new, merged, merged & ~sane, corrected, rescued, condition)

    def _corrected(self, state: State) -> tuple[State, Tensor]:
        """Inverse, sign and log-determinant of A by LU in float64."""
        fresh = _by_lu(state["frozen"])
        usable = _is_usable(fresh)
        lost = _is_lost(state["inverse_frozen"], fresh["inverse_frozen"])
        kept = {}
        for name, value in fresh.items():
            where = usable[..., None, None] if value.dim() > usable.dim() else usable
            kept[name] = torch.where(where, value, state[name])
        return kept, usable & lost

    def correct(self) -> Tensor:
        """Compute inverse, sign and log-determinant of A anew, by LU in float64.

        What is stored is then right to rounding at any condition, on both sides. Iterating on
        I − A·X costs as much and ends at eps·cond² on the other side (docs/results/correction.md).
        A matrix whose inverse is not finite in its dtype keeps what it has.

        Returns:
            Boolean tensor of shape `batch_shape`: inverses that had not one right digit left. Cost
            O(n³).
        """
        return super().correct()

    def _stored(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logabsdet = state["logabsdet_frozen"].double() + state["logabsdet_carry"].double()
        return state["frozen"], state["inverse_frozen"], state["sign"], logabsdet

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


def _by_lu(matrix: Tensor) -> dict[str, Tensor]:
    """What is stored beside A, computed in float64: buffers by name, in the dtype of A."""
    wide = matrix.double()
    sign, logabsdet = torch.linalg.slogdet(wide)
    rounded = logabsdet.to(matrix.dtype)
    derived = {
        "inverse_frozen": torch.linalg.inv_ex(wide).inverse,
        "sign": sign,
        "logabsdet_frozen": rounded,
        "logabsdet_carry": torch.nan_to_num(logabsdet - rounded.double()),
    }
    return {name: value.to(matrix.dtype) for name, value in derived.items()}


def _settle(state: State, new: State, doubtful: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    """Compute doubtful inverses anew; what is singular to working precision stays as it was.

    Writes into `new` and `condition`, and returns masks of what was computed anew and what of it
    had been lost.
    """
    a = new["frozen"][doubtful]
    fresh = {"frozen": a, **_by_lu(a)}
    exact = norm_1(a) * norm_1(fresh["inverse_frozen"])
    usable = _is_usable(fresh) & (exact < 1.0 / torch.finfo(a.dtype).eps)
    lost = _is_lost(new["inverse_frozen"][doubtful], fresh["inverse_frozen"])
    for name, value in fresh.items():
        where = usable[:, None, None] if value.dim() == 3 else usable
        new[name][doubtful] = torch.where(where, value, state[name][doubtful])
    condition[doubtful] = torch.where(
        usable, exact, norm_1(state["frozen"][doubtful]) * norm_1(state["inverse_frozen"][doubtful])
    )
    settled, rescued = torch.zeros_like(doubtful), torch.zeros_like(doubtful)
    settled[doubtful] = usable
    rescued[doubtful] = usable & lost
    return settled, rescued


def _is_lost(stored: Tensor, right: Tensor) -> Tensor:
    """Where a stored inverse has not one right digit."""
    distance = torch.linalg.matrix_norm(right - stored)
    # Written so that NaN counts as lost.
    return ~(distance <= _LOST * torch.linalg.matrix_norm(right))


def _is_usable(state: State) -> Tensor:
    """Where all that is stored beside A is finite and A is not singular."""
    inverse = state["inverse_frozen"].isfinite().flatten(-2).all(-1)
    return inverse & state["logabsdet_frozen"].isfinite() & (state["sign"] != 0)


def _add_to_logabsdet(state: State, increment: Tensor) -> State:
    """Kahan's compensated sum: what one addition rounds off takes part in the next."""
    old = state["logabsdet_frozen"]
    increment = increment + state["logabsdet_carry"]
    new = old + increment
    taken = new - old
    carry = (old - (new - taken)) + (increment - taken)
    return {"logabsdet_frozen": new, "logabsdet_carry": carry}
