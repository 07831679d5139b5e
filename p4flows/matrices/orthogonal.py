"""OrthogonalMatrix: the P4 concept with the Cayley map (Section 2.1)."""

import math

import torch
from torch import Tensor

from p4flows.arguments import check_positive_int
from p4flows.matrices.derived import derivations
from p4flows.matrices.directions import coordinates
from p4flows.matrices.linear_algebra import (
    add_product,
    inverse_small,
    newton_schulz,
    plus_identity,
    residual,
)
from p4flows.matrices.merge import Merged, State, probe
from p4flows.matrices.perturbed import PerturbedMatrix
from p4flows.matrices.precision import full_precision
from p4flows.matrices.rows import for_each_row

# Two Newton–Schulz steps take an error of this size to 1e-9; beyond it, an SVD is the way.
_NEARLY_ORTHOGONAL = 1e-2

# Beyond this size v is shorter, so that one learning rate serves all sizes.
_UNSCALED_UP_TO = 192


def default_rank(size: int) -> int:
    """The rank without further arguments: n up to 256, n/16 but no less than 64 beyond.

    Args:
        size: n.

    Returns:
        The rank.

    Example:
        >>> [default_rank(n) for n in (2, 64, 256, 1024)]
        [2, 64, 256, 64]
    """
    return size if size <= 256 else max(64, size // 16)


class OrthogonalMatrix(PerturbedMatrix):
    """Orthogonal matrices, perturbed by the Cayley map of a skew-symmetric matrix (Section 2.1).

    With S = (u vᵀ − v uᵀ)/2,

        Ã = Q A,  Q = (I − S/2)⁻¹ (I + S/2),

    the identity at u = 0, and Q = I + S to first order. v is not trained: its columns are multiples
    of those of the identity, dealt in a random order, and all of them at rank n, where S is any
    skew-symmetric matrix and an optimizer's state survives every merge. A merge makes Ã the new
    centre of the Cayley map, far from which the map learns slowly.

    The inverse is the transpose, ln|det| is 0 and no perturbation changes the sign of the
    determinant. Nothing is ill-conditioned, so no merge is skipped or forced.

    Args:
        size: n.
        batch_shape: a batch of independent matrices.
        rank: number k of columns of u and v; None is n up to 256, then n/16 or 64.
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
    _deals_basis = True
    _trains_v = False

    def __init__(
        self,
        size: int,
        *,
        batch_shape: tuple[int, ...] = (),
        rank: int | None = None,
        init: str | Tensor = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("size", size)
        self._scale = math.sqrt(min(1.0, _UNSCALED_UP_TO / size))
        rank = default_rank(size) if rank is None else rank
        super().__init__(size, batch_shape, rank, init, device, dtype)
        self.v.requires_grad_(False)

    def _directions(self, seed: Tensor, draws: Tensor) -> Tensor:
        return coordinates(seed, draws, (self.size, self.rank))

    @property
    def _keeps_v(self) -> bool:
        return self.rank == self.size

    def _multiply(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        (frozen,) = self._current("frozen")
        if self._keeps_v:
            y = x @ self._turned(frozen).mT
        else:
            left, right = _turn(*self._factors()[1:])
            z = x @ frozen.mT
            y = z + (z @ right.mT) @ left.mT
        y = y if bias is None else y + bias.unsqueeze(-2)
        return y, for_each_row(torch.zeros_like(self.sign), x)

    def _solve(self, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        (frozen,) = self._current("frozen")
        x = y if bias is None else y - bias.unsqueeze(-2)
        if self._keeps_v:
            x = x @ self._turned(frozen)
        else:
            left, right = _turn(*self._factors()[1:])
            x = (x + (x @ left) @ right) @ frozen
        return x, for_each_row(torch.zeros_like(self.sign), y)

    def _turned(self, frozen: Tensor) -> Tensor:
        """Q A."""
        _, u, v = self._factors()
        if self._keeps_v:
            return 2.0 * (_centre(u, v) @ frozen) - frozen
        left, right = _turn(u, v)
        return frozen + left @ (right @ frozen)

    def dense(self) -> Tensor:
        """Ã = Q A, shape `(*batch_shape, n, n)`."""
        with full_precision(self.frozen.device):
            (frozen,) = self._current("frozen")
            return self._turned(frozen)

    def inverse(self) -> Tensor:
        """Ã⁻¹ = Ãᵀ, shape `(*batch_shape, n, n)`."""
        return self.dense().mT

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Sign of det Ã and ln|det Ã| = 0, each of shape `batch_shape`."""
        (sign,) = self._current("sign")
        return sign, torch.zeros_like(sign)

    def penalty(self) -> Tensor:
        """Zero, shape `batch_shape`: no Cayley map is ill-conditioned."""
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
        # Factors in float64, so that only the products with A round.
        u, v = (state[name].double() for name in ("u", "v"))
        if self._keeps_v:
            left = 2.0 * _centre(u, v) - torch.eye(self.size, dtype=u.dtype, device=u.device)
            new = left.to(frozen.dtype) @ frozen
        else:
            left, right = _turn(u, v)
            new = add_product(frozen, left.to(frozen.dtype), right.to(frozen.dtype) @ frozen)
        merged = candidates & left.isfinite().flatten(-2).all(-1)
        new = torch.where(merged[..., None, None], new, frozen)
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


def _centre(u: Tensor, v: Tensor) -> Tensor:
    """(I − S/2)⁻¹ by n × n matrices: Q is twice that, minus I."""
    half = u @ v.mT / 4
    return inverse_small(plus_identity(half.mT - half))


def _turn(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """L and R with Q = I + L R, of shapes (*batch, n, 2k) and (*batch, 2k, n), by Woodbury.

    With S/2 = P R, Q = (I − P R)⁻¹ (I + P R) = I + 2 P (I − R P)⁻¹ R.
    """
    p = torch.cat([u, -v], dim=-1) / 4
    right = torch.cat([v, u], dim=-1).mT
    return 2.0 * p @ inverse_small(plus_identity(-right @ p)), right


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
