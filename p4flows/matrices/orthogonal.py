"""OrthogonalMatrix: the P4 concept with pairs of Householder reflections (Section 2.1)."""

import torch
from torch import Tensor

from p4flows.matrices.derived import derivations
from p4flows.matrices.linear_algebra import add_product, compact_wy, newton_schulz, residual
from p4flows.matrices.merge import Merged, State, probe
from p4flows.matrices.perturbed import PerturbedMatrix
from p4flows.matrices.precision import full_precision
from p4flows.matrices.rows import for_each_row

# Two Newton–Schulz steps take an error of this size to 1e-9; beyond it, an SVD is the way.
_NEARLY_ORTHOGONAL = 1e-2


class OrthogonalMatrix(PerturbedMatrix):
    """Orthogonal matrices, perturbed by k pairs of Householder reflections (Section 2.1).

    With H(a) = I − 2 a aᵀ/aᵀa,

        Ã = Q A,  Q = Π_j H(v_j + ‖v_j‖² u_j/4) H(v_j):

    a pair turns the plane of u_j and v_j, by 2·atan(‖u_j‖·‖v_j‖/4) where u_j ⊥ v_j. It is the
    identity at u = 0, and Q = I + Σ_j (u_j v_jᵀ − v_j u_jᵀ)/2 to first order. Due to the factor
    ‖v_j‖²/4, a step of gradient descent on u at rate η is, averaged over v, the step
    Q = I − η·skew(∂J/∂A · Aᵀ) of Riemannian gradient descent on A.

    The inverse is the transpose, ln|det| is 0 and no perturbation changes the sign of the
    determinant. Nothing is ill-conditioned, so no merge is skipped or forced.

    Args:
        size: n.
        batch_shape: a batch of independent matrices.
        rank: number k of pairs, columns of u and v.
        init: see `PerturbedMatrix`; orthogonal, and rounding errors in it are corrected.
        device: where; by default that of init, or torch's default device.
        dtype: by default that of init, or torch's default dtype.

    Attributes:
        frozen: buffer, A, shape `(*batch_shape, n, n)`.
        sign: buffer, det A, shape `batch_shape`.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the size or rank is out of range, or init is of another shape, not finite
            or not orthogonal.

    Example:
        >>> matrix = OrthogonalMatrix(3)
        >>> with torch.no_grad():
        ...     _ = matrix.u.normal_()
        >>> before = matrix.dense()
        >>> matrix.merge().item(), torch.allclose(matrix.frozen, before, atol=1e-6)
        (True, True)
        >>> torch.allclose(before @ matrix.inverse(), torch.eye(3), atol=1e-6)
        True
    """

    sign: Tensor

    _derived = ("sign",)
    _derivation = "orthogonal"

    def __init__(
        self,
        size: int,
        *,
        batch_shape: tuple[int, ...] = (),
        rank: int = 1,
        init: str | Tensor = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(size, batch_shape, rank, init, device, dtype)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        (frozen,) = self._current("frozen")
        w, t = _reflections(*self._factors()[1:])
        y = x @ frozen.mT
        y = y - (y @ w) @ (w @ t).mT
        y = y if bias is None else y + bias.unsqueeze(-2)
        return y, for_each_row(torch.zeros_like(self.sign), x)

    def _solve(self, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        (frozen,) = self._current("frozen")
        w, t = _reflections(*self._factors()[1:])
        x = y if bias is None else y - bias.unsqueeze(-2)
        return (x - (x @ (w @ t)) @ w.mT) @ frozen, for_each_row(torch.zeros_like(self.sign), y)

    def dense(self) -> Tensor:
        """Ã = Q A, shape `(*batch_shape, n, n)`."""
        with full_precision(self.frozen.device):
            (frozen,) = self._current("frozen")
            w, t = _reflections(*self._factors()[1:])
            return frozen - (w @ t) @ (w.mT @ frozen)

    def inverse(self) -> Tensor:
        """Ã⁻¹ = Ãᵀ, shape `(*batch_shape, n, n)`."""
        return self.dense().mT

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Sign of det Ã and ln|det Ã| = 0, each of shape `batch_shape`."""
        (sign,) = self._current("sign")
        return sign, torch.zeros_like(sign)

    def penalty(self) -> Tensor:
        """Zero, shape `batch_shape`: no product of reflections is ill-conditioned."""
        return torch.zeros_like(self.sign)

    def correct(self) -> Tensor:
        """Move A to the nearest orthogonal matrix: two Newton–Schulz steps, or an SVD in float64.

        Returns:
            Boolean tensor of shape `batch_shape`: matrices too far off for Newton–Schulz, rebuilt
            by SVD. Cost O(n³).
        """
        return super().correct()

    def _corrected(self, state: State) -> tuple[State, Tensor]:
        frozen = state["frozen"]
        # Written so that NaN counts as lost.
        lost = ~(_deviation(frozen) < _NEARLY_ORTHOGONAL)
        refined = newton_schulz(newton_schulz(frozen))
        rescued = lost & frozen.isfinite().flatten(-2).all(-1)
        if bool(rescued.any()):
            polar = nearest_orthogonal(torch.nan_to_num(frozen))
            refined = torch.where(rescued[..., None, None], polar, refined)
        keep = (~lost | rescued)[..., None, None]
        return {"frozen": torch.where(keep, refined, frozen)}, rescued

    def _stored(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        frozen, sign = state["frozen"], state["sign"]
        return frozen, frozen.mT, sign, torch.zeros_like(sign)

    def _state_of(self, matrix: Tensor, dtype: torch.dtype) -> State:
        deviation = _deviation(matrix.double())
        # What rounding to the dtype it came in does to an orthogonal matrix.
        allowed = max(_NEARLY_ORTHOGONAL, self._rounding_of(matrix, dtype))
        if not bool((deviation < allowed).all()):
            raise ValueError(
                f"init must be orthogonal, got a matrix with ‖AᵀA − I‖ = {deviation.max():.1e}"
            )
        return _polar(matrix)

    @staticmethod
    def _rounding_of(matrix: Tensor, dtype: torch.dtype) -> float:
        return matrix.shape[-1] * torch.finfo(dtype).eps

    def _rebuilt(self, frozen: Tensor) -> State:
        return _polar(frozen)

    def _is_in_set(self, state: State) -> Tensor:
        return _deviation(state["frozen"]) < _NEARLY_ORTHOGONAL

    def _merged(self, state: State, candidates: Tensor, force: bool) -> Merged:
        """A ← Q A, followed by a probe of what it leaves."""
        frozen = state["frozen"]
        w, t = _reflections(*(state[name].to(frozen.dtype) for name in ("u", "v")))
        left, right = w @ t, w.mT @ frozen
        merged = candidates & (left.isfinite() & right.mT.isfinite()).flatten(-2).all(-1)
        column = merged[..., None, None]
        left, right = (torch.where(column, factor, 0.0) for factor in (left, right))
        new = add_product(frozen, left, right, alpha=-1.0)
        off, condition = probe(new, new.mT, state["draws"])
        rounding = self.size * torch.finfo(frozen.dtype).eps * condition
        # Written so that NaN is off. Without the tolerance of other matrices: ‖A‖₁·‖Aᵀ‖₁ grows with
        # n by itself, where the true condition is one.
        corrected = merged & ~(off <= rounding)
        forced, rescued = torch.zeros_like(merged), torch.zeros_like(merged)
        if bool(corrected.any()):
            fresh, rescued[corrected] = self._corrected({"frozen": new[corrected]})
            new[corrected] = fresh["frozen"]
        return Merged({"frozen": new}, merged, forced, corrected, rescued, condition)


def _reflections(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """W of shape `(*batch, n, 2k)` and T with Q = I − W T Wᵀ."""
    scale = v.square().sum(-2, keepdim=True) / 4
    w = torch.stack([v + scale * u, v], dim=-1).flatten(-2)
    return w, compact_wy(w)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal polar factor U Vᵀ of U S Vᵀ, by SVD in float64.

    Args:
        matrix: shape `(*batch, n, n)`.

    Returns:
        Tensor of the same shape and dtype. Cost O(n³).

    Example:
        >>> nearest_orthogonal(torch.diag(torch.tensor([2.0, -3.0])))
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    left, _, right = torch.linalg.svd(matrix.double())
    return (left @ right).to(matrix.dtype)


def _polar(matrix: Tensor) -> State:
    """The nearest orthogonal matrix, and the sign of its determinant."""
    nearest = nearest_orthogonal(matrix)
    return {
        "frozen": nearest,
        "sign": torch.linalg.slogdet(nearest.double()).sign.to(matrix.dtype),
    }


derivations["orthogonal"] = _polar


def _deviation(matrix: Tensor) -> Tensor:
    """Frobenius norm of I − AᵀA."""
    return torch.linalg.matrix_norm(residual(matrix.mT, matrix))
