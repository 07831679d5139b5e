"""InvertibleMatrix: P4Inv, with the inverse and the log-determinant beside it (2.2–2.4)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from p4flows.arguments import check_positive_int
from p4flows.matrices.bounds import MergeBounds
from p4flows.matrices.derived import derivations
from p4flows.matrices.linear_algebra import (
    add_product,
    inverse_small,
    log_singular_values,
    norm_1,
    plus_identity,
    slogdet_small,
)
from p4flows.matrices.merge import Merged, State, probe, probe_tolerance
from p4flows.matrices.perturbed import PerturbedMatrix, is_transformed
from p4flows.matrices.precision import full_precision
from p4flows.matrices.rows import (
    multiply_rows,
    solve_rows,
    through_inverse,
    through_matrix,
)

# A stored inverse further from the right one, relative to it, was of no use.
_LOST = 0.1

# Adam moves every entry of u by its learning rate η, so that a step turns a matrix of n dimensions
# by η·√n·scale where signs are random, whatever the rank. Rates that suit the layers around it
# (1e-3 to 1e-2) suit a matrix of up to so many dimensions; beyond, v is shorter
# (benchmarks/learning.py).
_UNSCALED_UP_TO = 48

_KINDS = ("relative", "additive")


def default_rank(size: int) -> int:
    """The rank that gives the best likelihood for a given training time: n up to 64, 8√n beyond.

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

    Ã = A + u R with R of shape (k, n). Two perturbations are known:

    - "relative": R = vᵀA, so that Ã = (I + u vᵀ) A. ∂J/∂u is the relative gradient (∂J/∂A)Aᵀ seen
      through v (Gresele et al. 2020), which depends neither on the scale nor on the condition of A.
      v is not trained: its columns are those of random orthogonal bases, dealt in turn, and at rank
      n one basis for good. det Ã = 0 is a barrier that training does not cross.
    - "additive": R = vᵀ, u and v trained (the paper). v is drawn from a normal distribution. It can
      cross det A = 0.

    The inverse and the log-determinant of A are stored beside it. Ã, its inverse and its
    determinant follow from them by the Woodbury identity and the determinant lemma (equations 3 and
    4), and so does a merge: O(n²k + k³). Only `correct` costs O(n³).

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
        right: buffer, R of a relative perturbation, not in the `state_dict`.

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
    right: Tensor

    _derived = ("inverse_frozen", "sign", "logabsdet_frozen", "logabsdet_carry")

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
        if perturbation not in _KINDS:
            raise ValueError(f"perturbation must be 'relative' or 'additive', got {perturbation!r}")
        check_positive_int("size", size)
        self.perturbation = self._derivation = perturbation
        self._is_relative = perturbation == "relative"
        self._deciding = ("frozen", "v") if self._is_relative else ("frozen",)
        self._deals_basis = self._is_relative
        self._trains_v = not self._is_relative
        self._scale = math.sqrt(min(1.0, _UNSCALED_UP_TO / size)) if self._is_relative else 1.0
        rank = default_rank(size) if rank is None else rank
        super().__init__(size, batch_shape, rank, init, device, dtype)
        self.bounds = bounds
        self.v.requires_grad_(self._trains_v)

    def _register_more(self) -> None:
        if self._is_relative:
            right = torch.zeros_like(self.v.mT, dtype=self.frozen.dtype)
            self.register_buffer("right", right, persistent=False)

    def _state_of(self, matrix: Tensor, dtype: torch.dtype) -> State:
        """A with its inverse and log-determinant, computed once in float64."""
        state = {"frozen": matrix, **_by_lu(matrix)}
        # Written so that NaN, the condition number of an exactly singular matrix, is refused too.
        if not bool(self._is_in_set(state).all()):
            condition = norm_1(matrix) * norm_1(state["inverse_frozen"])
            raise ValueError(
                f"init must be invertible, got a matrix that is singular to working precision "
                f"(condition number {condition.max().item():.1e} in {matrix.dtype})"
            )
        return state

    def _is_in_set(self, state: State) -> Tensor:
        matrix = state["frozen"]
        condition = norm_1(matrix) * norm_1(state["inverse_frozen"])
        return _is_usable(state) & (condition < 1.0 / torch.finfo(matrix.dtype).eps)

    def _completed(self, state: State) -> State:
        if self._is_relative:
            frozen = state["frozen"]
            state = {**state, "right": state["v"].to(frozen.dtype).mT @ frozen}
        return super()._completed(state)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        frozen, u, right, left, logabsdet = self._perturbation()
        through = multiply_rows if _is_single(x, frozen) else through_matrix
        return through(x, bias, u, right, left, frozen, logabsdet)

    def _solve(self, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        frozen, u, _, left, logabsdet = self._perturbation()
        (inverse,) = self._current("inverse_frozen")
        through = solve_rows if _is_single(y, frozen) else through_inverse
        return through(y, bias, u, left, inverse, logabsdet)

    def _perturbation(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A, u, R, Z = R A⁻¹ and ln|det A|."""
        beside = "right" if self._is_relative else "inverse_frozen"
        kept, logabsdet = self._current(beside, "logabsdet_frozen")
        frozen, u, v = self._factors()
        if self._is_relative:
            # Constant, as R is, also after a `requires_grad_()` of the whole flow.
            return frozen, u, kept, v.detach().mT, logabsdet
        return frozen, u, v.mT, v.mT @ kept, logabsdet

    def _inverse_factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """A⁻¹, and W and Z with Ã⁻¹ = A⁻¹ − W Z, of shapes (*batch, n, k) and (*batch, k, n)."""
        _, u, _, left, _ = self._perturbation()
        (inverse,) = self._current("inverse_frozen")
        return inverse, inverse @ u, inverse_small(plus_identity(left @ u)) @ left

    def dense(self) -> Tensor:
        """Ã = A + u R (equation 5), shape `(*batch_shape, n, n)`."""
        with full_precision(self.frozen.device):
            frozen, u, right, _, _ = self._perturbation()
            return frozen + u @ right

    def inverse(self) -> Tensor:
        """Ã⁻¹ (equation 3), shape `(*batch_shape, n, n)`."""
        with full_precision(self.frozen.device):
            inverse, w, z = self._inverse_factors()
            return inverse - w @ z

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Sign and log absolute determinant of Ã (equation 4), each of shape `batch_shape`."""
        with full_precision(self.frozen.device):
            _, u, _, left, logabsdet = self._perturbation()
            sign, change = slogdet_small(plus_identity(left @ u))
            (frozen_sign,) = self._current("sign")
            return frozen_sign * sign, logabsdet + change

    def penalty(self) -> Tensor:
        """g(u, v)/C_p of Appendix A, shape `batch_shape`; multiply by a strength of your own."""
        with full_precision(self.frozen.device):
            _, u, _, left, logabsdet = self._perturbation()
            _, change = slogdet_small(plus_identity(left @ u))
            return self.bounds.penalty(change, logabsdet + change)

    def _merged(self, state: State, candidates: Tensor, force: bool) -> Merged:
        """Algorithm 2, followed by a probe of what it leaves."""
        a, x = state["frozen"], state["inverse_frozen"]
        u, v = state["u"].to(a.dtype), state["v"].to(a.dtype)
        right, left = (state["right"], v.mT) if self._is_relative else (v.mT, v.mT @ x)
        g = plus_identity(left @ u)
        g_inverse = inverse_small(g)
        factor = g_inverse @ left
        sign, change = slogdet_small(g)
        sane = self._is_sane(g, g_inverse, state["logabsdet_frozen"] + change)
        tried = candidates & change.isfinite() & (sane | force)
        column = tried[..., None, None]
        u, right, factor = (torch.where(column, each, 0.0) for each in (u, right, factor))
        new = {
            "frozen": add_product(a, u, right),
            "inverse_frozen": add_product(x, x @ u, factor, alpha=-1.0),
            "sign": state["sign"] * torch.where(tried, sign, 1.0),
            **_add_to_logabsdet(state, torch.where(tried, change, 0.0)),
        }
        off, condition = probe(new["frozen"], new["inverse_frozen"], state["draws"])
        eps = torch.finfo(a.dtype).eps
        # Written so that NaN is doubtful.
        passed = off <= probe_tolerance(self.size) * self.size * eps * condition
        doubtful = tried & ~(passed & (condition < 1.0 / eps))
        corrected = rescued = torch.zeros_like(tried)
        if bool(doubtful.any()):
            corrected, rescued = _settle(state, new, doubtful, condition)
        merged = tried & (~doubtful | corrected)
        return Merged(new, merged, merged & ~sane, corrected, rescued, condition)

    def _is_sane(self, g: Tensor, g_inverse: Tensor, logabsdet: Tensor) -> Tensor:
        """Where a merge is within its bounds."""
        # The singular values lie between 1/‖G⁻¹‖ and ‖G‖; mostly that is enough to know.
        norms = [torch.linalg.matrix_norm(each).log() for each in (g_inverse, g)]
        sane = self.bounds.accept(torch.stack([-norms[0], norms[1]], -1), logabsdet)
        return sane if bool(sane.all()) else self.bounds.accept(log_singular_values(g), logabsdet)

    def _rebuilt(self, frozen: Tensor) -> State:
        return _by_lu(frozen)

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
        """Compute inverse, sign and log-determinant of A again, by LU in float64.

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

    def _kind_of(self, basis: bool) -> int:
        return 2 * _KINDS.index(self.perturbation) + basis

    def _layout(self) -> tuple[Any, ...]:
        return (*super()._layout(), self.bounds, self.perturbation)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        kind = state_dict.get(prefix + "kind")
        if isinstance(kind, Tensor) and not kind.is_meta:
            saved = _KINDS[int(kind) // 2]
            if saved != self.perturbation:
                # The tensors are of the same names and shapes, and mean another matrix.
                error_msgs: list[str] = arguments[-1]
                error_msgs.append(
                    f"{prefix.rstrip('.') or type(self).__name__} was saved with "
                    f"perturbation={saved!r} and has {self.perturbation!r}: build it with "
                    f"perturbation={saved!r} to load it"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Size, batch shape, rank and perturbation, for `repr`."""
        return f"{super().extra_repr()}, perturbation={self.perturbation!r}"


def _is_single(rows: Tensor, frozen: Tensor) -> bool:
    """Whether hand-written gradients apply: rows of one matrix, and nobody follows operations."""
    return rows.dim() == 2 and frozen.dim() == 2 and not is_transformed()


def _by_lu(matrix: Tensor) -> State:
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
    return {name: value.to(matrix.dtype).contiguous() for name, value in derived.items()}


def _relative_by_lu(matrix: Tensor, v: Tensor) -> State:
    return {"right": v.mT @ matrix, **_by_lu(matrix)}


derivations["additive"] = _by_lu
derivations["relative"] = _relative_by_lu


def _settle(state: State, new: State, doubtful: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    """Derive doubtful inverses again; what is singular to working precision stays as it was.

    Writes into `new` and `condition`, and returns masks of what was derived again and what of it
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
