"""PerturbedMatrix: a frozen matrix with a small trainable perturbation (paper, Section 2.1)."""

import abc
import copy
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from p4flows.arguments import check_positive_int
from p4flows.draws import basis_columns, standard_normal

# How v is drawn anew, by name: see `PerturbedMatrix.attempt_merge`.
Draw = Literal["normal", "basis"]
_DRAWS = {"normal": standard_normal, "basis": basis_columns}

_living: "weakref.WeakSet[PerturbedMatrix]" = weakref.WeakSet()


def living_matrices() -> "list[PerturbedMatrix]":
    """All perturbed matrices there are, copies and unpickled ones included."""
    return list(_living)


class MergeOutcome(NamedTuple):
    """What a merge did with each matrix: boolean tensors of the matrices' `batch_shape`.

    Attributes:
        merged: the perturbation went into the frozen matrix.
        forced: merged although the merge was outside its bounds.
        reset: the perturbation was not finite and was thrown away without a merge.
    """

    merged: Tensor
    forced: Tensor
    reset: Tensor


def _initial_matrix(size: int, batch_shape: tuple[int, ...], init: str | Tensor) -> Tensor:
    """The matrix that `init` describes, of shape (*batch_shape, size, size)."""
    if isinstance(init, str):
        identity = torch.eye(size)
        named = {"identity": identity, "reverse": identity.flip(0)}
        if init not in named:
            raise ValueError(f"init must be one of {sorted(named)} or a tensor, got {init!r}")
        matrix = named[init]
    elif isinstance(init, Tensor):
        matrix = init.detach()
        if matrix.is_complex():
            raise TypeError(f"init must be real, got {matrix.dtype}")
        if not matrix.is_floating_point():
            matrix = matrix.to(torch.get_default_dtype())
    else:
        raise TypeError(f"init must be a name or a tensor, got {type(init).__name__}")
    shape = (*batch_shape, size, size)
    if matrix.shape not in {shape, (size, size)}:
        raise ValueError(f"init must have shape {shape}, got {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        raise ValueError("init must be finite, got NaN or infinite entries")
    return matrix.expand(shape).clone(memory_format=torch.contiguous_format)


class PerturbedMatrix(nn.Module, abc.ABC):
    """A frozen matrix A in a feasible set S, read through a trainable perturbation R_B.

    The perturbation has two factors B = (u, v). Whatever v is, u = 0 gives the identity
    (B₀ of the paper); v holds the random directions in which u can move the matrix. A step of the
    optimizer trains u and v; `merge` carries them into A (equations 1 and 2) and starts again
    from u = 0 and a fresh v. Neither `train`, `eval` nor reading changes any number.

    A new property is a subclass that implements `multiply`, `solve`, `dense`, `inverse`, `slogdet`,
    `correct`, `penalty`, `_state_of` and `_merge`.

    It is a parametrization in the sense of `torch.nn.utils.parametrize` as well: called, it returns
    Ã, and `right_inverse` takes a matrix over. It brings its own parameters, so that the weight it
    stands for leaves none of size n² behind.

    Args:
        size: n.
        batch_shape: a batch of independent matrices.
        rank: number k of columns of u and v, 1 ≤ k ≤ size.
        init: the initial A: "identity", "reverse" (A_ij = δ_i(n−j)) or a tensor of shape `(n, n)`
            or `(*batch_shape, n, n)`, which then gives dtype and device.

    Attributes:
        u: parameter, shape `(*batch_shape, size, rank)`, zero after a merge.
        v: parameter, same shape, drawn so that E[v vᵀ] is the same multiple of I at every rank.
        frozen: buffer, A.
        seed: buffer, int64 of shape `batch_shape`: each draw of v is a function of it and `draws`.
        draws: buffer, int64 of shape `batch_shape`: how often v has been drawn.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the size or rank is out of range, or init is of another shape, not finite
            or outside of S.
    """

    _version = 1

    frozen: Tensor
    seed: Tensor
    draws: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Entered among the living, for copies and pickles do not call the constructor."""
        matrix = super().__new__(cls)
        _living.add(matrix)
        return matrix

    def __init__(
        self, size: int, batch_shape: tuple[int, ...], rank: int, init: str | Tensor
    ) -> None:
        super().__init__()
        check_positive_int("size", size)
        if not isinstance(batch_shape, tuple):
            raise TypeError(f"batch_shape must be a tuple, got {type(batch_shape).__name__}")
        for extent in batch_shape:
            check_positive_int("each of batch_shape", extent)
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise TypeError(f"rank must be an int, got {type(rank).__name__}")
        if not 1 <= rank <= size:
            raise ValueError(f"rank must be between 1 and {size} (the size), got {rank}")
        frozen = _initial_matrix(size, batch_shape, init)
        for name, value in self._state_of(frozen).items():
            self.register_buffer(name, value)
        self.u = nn.Parameter(frozen.new_zeros(*batch_shape, size, rank))
        self.v = nn.Parameter(frozen.new_zeros(*batch_shape, size, rank))
        seed = torch.randint(1 << 62, batch_shape, dtype=torch.int64)
        self.register_buffer("seed", seed.to(frozen.device))
        self.register_buffer("draws", torch.zeros_like(self.seed))
        self.reset()

    @property
    def _first_draw(self) -> Draw:
        """How v is drawn at first and after a reset."""
        return "normal"

    @property
    def _scale(self) -> float:
        """The length of v, relative to E[v vᵀ] = I."""
        return 1.0

    @property
    def size(self) -> int:
        """Number n of rows and columns."""
        return self.frozen.shape[-1]

    @property
    def rank(self) -> int:
        """Number k of columns of u and v."""
        return self.u.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of matrices, `()` for a single one."""
        return self.frozen.shape[:-2]

    @abc.abstractmethod
    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Ã x + bias for rows x of shape `(*batch_shape, N, n)`, in O(n²N)."""

    @abc.abstractmethod
    def solve(self, y: Tensor) -> Tensor:
        """Ã⁻¹ y for rows y of shape `(*batch_shape, N, n)`, in O(n²N)."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """The perturbed matrix Ã = R_B(A), shape `(*batch_shape, n, n)`, in O(n²k)."""

    @abc.abstractmethod
    def inverse(self) -> Tensor:
        """The inverse of the perturbed matrix, shape `(*batch_shape, n, n)`, in O(n²k)."""

    @abc.abstractmethod
    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Sign and log absolute determinant of Ã, each of shape `batch_shape`, in O(n²k)."""

    @abc.abstractmethod
    def correct(self) -> Tensor:
        """Rectify the rounding errors of past merges, in O(n³).

        Returns:
            Boolean tensor of shape `batch_shape`: what had to be rebuilt from A.
        """

    @abc.abstractmethod
    def penalty(self) -> Tensor:
        """Penalty on ill-conditioned perturbations, shape `batch_shape`, differentiable."""

    @abc.abstractmethod
    def _state_of(self, matrix: Tensor) -> dict[str, Tensor]:
        """The buffers that store a given A, "frozen" among them; ValueError when A is not in S."""

    @abc.abstractmethod
    def _merge(self, candidates: Tensor, force: bool) -> tuple[Tensor, Tensor]:
        """Carry the perturbation of the candidates into the frozen state; (merged, forced)."""

    def multiply_and_logabsdet(
        self, x: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What a layer returns in the forward direction; for a single matrix only.

        Args:
            x: shape `(N, n)`.
            bias: b, shape `(n,)`, or None.

        Returns:
            Ã x + b of shape `(N, n)` and ln|det Ã| of shape `(N,)`.
        """
        return self.multiply(x, bias), self.slogdet()[1].repeat(len(x))

    def solve_and_logabsdet(self, y: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What a layer returns in the inverse direction; for a single matrix only.

        Args:
            y: shape `(N, n)`.
            bias: b, shape `(n,)`, or None.

        Returns:
            Ã⁻¹ (y − b) of shape `(N, n)` and −ln|det Ã| of shape `(N,)`.
        """
        x = self.solve(y if bias is None else y - bias)
        return x, -self.slogdet()[1].repeat(len(y))

    def merge(self, force: bool = False) -> Tensor:
        """Merge the perturbation into the frozen matrix: A ← R_B(A), then B ← B₀.

        The perturbed matrix, its inverse and its determinant do not change beyond rounding. A
        perturbation that is not finite is reset and not merged.

        Args:
            force: merge also what is outside its bounds (N_force of the paper's Appendix B). A
                merge that would leave the frozen state non-finite is refused all the same.

        Returns:
            Boolean tensor of shape `batch_shape`: what was merged.
        """
        return self.attempt_merge(force).merged

    @torch.no_grad()
    def attempt_merge(self, force: bool = False, draw: Draw = "normal") -> MergeOutcome:
        """As `merge`, with the reasons.

        Args:
            force: as in `merge`.
            draw: how v is drawn anew. "normal": from N(0, I/rank), independent of all draws before
                (the paper). "basis": the next columns of a random orthogonal basis, of the same
                length, so that n/rank merges in a row visit every direction equally; at rank n the
                first basis stays.

        Returns:
            What was merged, what of it by force, and what was reset.
        """
        finite = (self.u.isfinite() & self.v.isfinite()).flatten(-2).all(-1)
        merged, forced = self._merge(finite, force)
        self._restart(merged | ~finite, draw)
        return MergeOutcome(merged, forced, ~finite)

    @torch.no_grad()
    def reset(self) -> None:
        """Throw the perturbation away: u ← 0, v ← a fresh draw; A stays."""
        self._restart(torch.ones_like(self.draws, dtype=torch.bool), self._first_draw)

    @torch.no_grad()
    def assign(self, init: str | Tensor) -> None:
        """Take another matrix over: A ← init, B ← B₀.

        Args:
            init: as in the constructor; dtype and device stay.

        Raises:
            TypeError: when init is neither a name nor a tensor.
            ValueError: when it is of another shape, not finite or outside of S. Nothing has changed
                then.
        """
        matrix = _initial_matrix(self.size, self.batch_shape, init).to(self.frozen)
        for name, value in self._state_of(matrix).items():
            getattr(self, name).copy_(value)
        self.reset()

    def forward(self) -> Tensor:
        """Ã, for `torch.nn.utils.parametrize`."""
        return self.dense()

    def right_inverse(self, matrix: Tensor) -> tuple[()]:
        """As `assign`, for `torch.nn.utils.parametrize`; the originals it asks for are none."""
        self.assign(matrix)
        return ()

    def _restart(self, where: Tensor, draw: Draw) -> None:
        """Set u to zero and redraw v for the matrices in `where`."""
        # All directions are in the first basis already: in another one, an optimizer's averages of
        # squares would be those of other directions.
        stays = draw == "basis" and self.rank == self.size
        counter = torch.zeros_like(self.draws) if stays else self.draws
        fresh = _DRAWS[draw](self.seed, counter, (self.size, self.rank))
        fresh = (fresh * (self._scale / math.sqrt(self.rank))).to(self.v.dtype)
        column = where[..., None, None]
        self.u.masked_fill_(column, 0.0)
        self.v.copy_(torch.where(column, fresh, self.v))
        self.draws.add_(where)

    @classmethod
    def stack(cls, matrices: Sequence[Self]) -> Self:
        """One batched matrix that holds copies of several of the same shape and kind.

        Args:
            matrices: at least one; same class, size, rank, dtype, device and bounds.

        Returns:
            A matrix of `batch_shape = (len(matrices), *matrices[0].batch_shape)`.

        Raises:
            ValueError: when they differ.
        """
        if len({matrix.layout() for matrix in matrices}) != 1:
            found = sorted({str(matrix.layout()) for matrix in matrices})
            raise ValueError(f"matrices must be one or more of the same layout, got {found}")
        first = matrices[0]
        stacked = copy.copy(first)
        stacked._parameters = {
            name: nn.Parameter(
                torch.stack([matrix._parameters[name].detach() for matrix in matrices]),  # type: ignore[union-attr]
                requires_grad=parameter.requires_grad,
            )
            for name, parameter in first._parameters.items()
            if parameter is not None
        }
        stacked._buffers = {
            name: torch.stack([matrix._buffers[name] for matrix in matrices])  # type: ignore[misc]
            for name in first._buffers
        }
        return stacked

    @torch.no_grad()
    def unstack_into(self, matrices: Sequence["PerturbedMatrix"]) -> None:
        """Write the state of a stacked matrix back into the matrices it was made from.

        Args:
            matrices: as many as the leading dimension of `batch_shape`, in the order of `stack`.
        """
        for name, stacked in (*self.named_parameters(), *self.named_buffers()):
            targets = [getattr(matrix, name) for matrix in matrices]
            torch._foreach_copy_(targets, list(stacked.unbind()))

    def layout(self) -> tuple[Any, ...]:
        """What two matrices must have in common to be stacked."""
        return (
            type(self).__name__,
            tuple(self.u.shape),
            self.u.dtype,
            self.u.device,
            self.u.requires_grad,
            self.v.requires_grad,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.double()` and `.cuda()` call."""
        before = torch.finfo(self.frozen.dtype).eps
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if torch.finfo(self.frozen.dtype).eps < before and not self.frozen.is_meta:
            # What was kept beside A is as exact as the narrower dtype let it be.
            self.correct()
        return self

    def extra_repr(self) -> str:
        """Size, batch shape and rank, for `repr`."""
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"size={self.size}{batch}, rank={self.rank}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        version = local_metadata.get("version", self._version)
        if version > self._version:
            raise RuntimeError(
                f"{prefix.rstrip('.') or type(self).__name__} was saved with state layout version "
                f"{version}, newer than {self._version}: update p4flows to load it"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
