"""PerturbedMatrix: a frozen matrix with a small trainable perturbation (paper, Section 2.1)."""

import abc
import copy
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from p4flows.arguments import check_positive_int, is_int
from p4flows.matrices.directions import Draw, basis_columns, standard_normal
from p4flows.matrices.error import MatrixError, error_of_state
from p4flows.matrices.merge import (
    Merged,
    MergeOutcome,
    State,
    merge_together,
    read_state,
    write_state,
)
from p4flows.matrices.perturbation import for_each_row
from p4flows.matrices.precision import on_rows, storage_dtype, without_autocast

_DRAWS = {"normal": standard_normal, "basis": basis_columns}

_living: "weakref.WeakSet[PerturbedMatrix]" = weakref.WeakSet()


def living_matrices() -> "list[PerturbedMatrix]":
    """All perturbed matrices there are, copies and unpickled ones included."""
    return list(_living)


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
    `penalty`, `_state_of`, `_stored`, `_merged` and `_corrected`.

    It is a parametrization in the sense of `torch.nn.utils.parametrize` as well: called, it returns
    Ã, and `right_inverse` takes a matrix over. It brings its own parameters, so that the weight it
    stands for leaves none of size n² behind.

    Args:
        size: n.
        batch_shape: a batch of independent matrices.
        rank: number k of columns of u and v, 1 ≤ k ≤ size.
        init: the initial A: "identity", "reverse" (the reverse permutation, A_ij = δ_{i, n+1−j}
            with rows and columns counted from one) or a tensor of shape `(n, n)` or
            `(*batch_shape, n, n)`, which then gives dtype and device.
        device: where; by default that of init, or torch's default device.
        dtype: by default that of init, or torch's default dtype.

    Attributes:
        u: parameter, shape `(*batch_shape, size, rank)`, zero after a merge.
        v: parameter, same shape, drawn so that E[v vᵀ] is the same multiple of I at every rank.
        frozen: buffer, A.
        seed: buffer, int64 of shape `batch_shape`: each draw of v is a function of it and `draws`.
        draws: buffer, int64 of shape `batch_shape`: how often v has been drawn.
        draw: how, "normal" or "basis"; see `draw_as`, which a `MergeHook` calls.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the size or rank is out of range, or init is of another shape, not finite
            or outside of S.
    """

    _version = 1
    _init: str
    draw: Draw = "normal"

    u: nn.Parameter
    v: nn.Parameter
    frozen: Tensor
    seed: Tensor
    draws: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Entered among the living, for copies and pickles do not call the constructor."""
        matrix = super().__new__(cls)
        _living.add(matrix)
        return matrix

    def __init__(
        self,
        size: int,
        batch_shape: tuple[int, ...],
        rank: int,
        init: str | Tensor,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_positive_int("size", size)
        if not isinstance(batch_shape, tuple):
            raise TypeError(f"batch_shape must be a tuple, got {type(batch_shape).__name__}")
        for extent in batch_shape:
            check_positive_int("each of batch_shape", extent)
        if not is_int(rank):
            raise TypeError(f"rank must be an int, got {type(rank).__name__}")
        if not 1 <= rank <= size:
            raise ValueError(f"rank must be between 1 and {size} (the size), got {rank}")
        home = init.device if isinstance(init, Tensor) else None
        if device is None:
            # get_default_device of torch 2.4 leaves out what `with torch.device` says.
            device = torch.empty(0).device if home is None else home
        # On the CPU first: a device may be meta, where nothing can be computed or checked.
        with torch.device("cpu" if home is None else home):
            initial = _initial_matrix(size, batch_shape, init)
            initial = initial if dtype is None else initial.to(dtype)
            frozen = initial.to(storage_dtype(initial.dtype))
            for name, value in self._state_of(frozen).items():
                self.register_buffer(name, value)
            self.u = nn.Parameter(initial.new_zeros(*batch_shape, size, rank))
            self.v = nn.Parameter(initial.new_zeros(*batch_shape, size, rank))
            self.register_buffer("seed", frozen.new_zeros(batch_shape, dtype=torch.int64))
            self.register_buffer("draws", torch.zeros_like(self.seed))
            self._start()
        self._init = init if isinstance(init, str) else "identity"
        self.to(device)

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
        """Ã x + bias for rows x: no n × n matrix is formed or differentiated (Appendix B).

        Args:
            x: shape `(*batch_shape, N, n)`.
            bias: shape `(*batch_shape, n)` or None.

        Returns:
            Tensor of the shape of x. Cost O(n²N).
        """

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

    @torch.no_grad()
    @without_autocast
    def correct(self) -> Tensor:
        """Rectify the rounding errors of past merges, in O(n³).

        Returns:
            Boolean tensor of shape `batch_shape`: what had to be rebuilt from A.
        """
        state, rescued = self._corrected(read_state([self]))
        write_state([self], state)
        return rescued

    @abc.abstractmethod
    def penalty(self) -> Tensor:
        """Penalty on ill-conditioned perturbations, shape `batch_shape`, differentiable."""

    def error(self) -> MatrixError:
        """How far the stored inverse and log-determinant are from those of A, in O(n³).

        Returns:
            A `MatrixError` of float64 tensors of shape `batch_shape`: both residuals, LAPACK's
            ratio, the errors of log-determinant and sign, and the condition number of A. The
            perturbation has no part in it. `correct` takes the ratio to one at most.

        Example:
            >>> from p4flows import InvertibleMatrix
            >>> bool(InvertibleMatrix(3, batch_shape=(2,)).error().worst().ratio <= 1)
            True
        """
        return error_of_state(*self._stored(read_state([self])))

    @abc.abstractmethod
    def _stored(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, A⁻¹, the sign and ln|det A| of a state of this layout."""

    @abc.abstractmethod
    def _state_of(self, matrix: Tensor) -> dict[str, Tensor]:
        """The buffers that store a given A, "frozen" among them; ValueError when A is not in S."""

    @abc.abstractmethod
    def _merged(self, state: State, candidates: Tensor, force: bool) -> Merged:
        """What a merge makes of a state of this layout; it writes nothing.

        Candidates have a finite perturbation. What is not merged keeps its values.
        """

    @abc.abstractmethod
    def _corrected(self, state: State) -> tuple[State, Tensor]:
        """What a correction makes of a state, and what had to be rebuilt; it writes nothing."""

    @on_rows
    def multiply_and_logabsdet(
        self, x: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What a layer returns in the forward direction.

        Args:
            x: shape `(*batch_shape, N, n)`.
            bias: b, shape `(*batch_shape, n)`, or None.

        Returns:
            Ã x + b of the shape of x and ln|det Ã| of shape `(*batch_shape, N)`.
        """
        y = self.multiply(x, bias)
        return y, for_each_row(self.slogdet()[1], y)

    @on_rows
    def solve_and_logabsdet(self, y: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What a layer returns in the inverse direction.

        Args:
            y: shape `(*batch_shape, N, n)`.
            bias: b, shape `(*batch_shape, n)`, or None.

        Returns:
            Ã⁻¹ (y − b) of the shape of y and −ln|det Ã| of shape `(*batch_shape, N)`.
        """
        x = self.solve(y if bias is None else y - bias.unsqueeze(-2))
        return x, for_each_row(-self.slogdet()[1], x)

    def factors(self) -> tuple[Tensor, Tensor]:
        """u and v in the dtype of A, in which all is computed."""
        return self.u.to(self.frozen.dtype), self.v.to(self.frozen.dtype)

    def merge(self, force: bool = False) -> Tensor:
        """Merge the perturbation into the frozen matrix: A ← R_B(A), then B ← B₀.

        The perturbed matrix, its inverse and its determinant do not change beyond rounding; what
        the stored inverse lost is noticed by a probe and computed anew. All is computed before
        anything is written. A perturbation that is not finite is reset and not merged.

        Args:
            force: merge also what is outside its bounds (N_force of the paper's Appendix B). What
                would be singular to working precision is reset instead.

        Returns:
            Boolean tensor of shape `batch_shape`: what was merged.
        """
        return self.attempt_merge(force).merged

    @torch.no_grad()
    def attempt_merge(self, force: bool = False) -> MergeOutcome:
        """As `merge`, with the reasons.

        Args:
            force: as in `merge`.

        Returns:
            What was merged, what of it by force, and what was reset.
        """
        return merge_together([self], force).outcome

    @torch.no_grad()
    def draw_as(self, draw: Draw) -> None:
        """Draw v another way from now on, and at once where it is still the first one and u = 0.

        Args:
            draw: "normal": from N(0, I/rank), independent of all draws before (the paper). "basis":
                the next columns of random orthogonal bases, of the same length, so that the first
                n directions, and every n after them, are a whole basis; at rank n the first one
                stays.

        Raises:
            ValueError: when it is neither.
        """
        if draw not in _DRAWS:
            raise ValueError(f"draw must be 'normal' or 'basis', got {draw!r}")
        is_new, self.draw = draw != self.draw, draw
        if is_new and not self.frozen.is_meta:
            state = read_state([self])
            untouched = (self.draws == 1) & (self.u == 0).flatten(-2).all(-1)
            state["draws"] = self.draws - untouched.long()
            write_state([self], self._restarted(state, untouched))

    @torch.no_grad()
    def reset(self) -> None:
        """Throw the perturbation away: u ← 0, v ← a fresh draw; A stays."""
        everywhere = torch.ones_like(self.draws, dtype=torch.bool)
        write_state([self], self._restarted(read_state([self]), everywhere))

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
        state = self._state_of(matrix)
        everywhere = torch.ones_like(self.draws, dtype=torch.bool)
        state.update(self._restarted(read_state([self]), everywhere))
        write_state([self], state)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin anew, as just constructed: A, u = 0, and a v from a fresh seed.

        An `init` that was a tensor is not kept: A is the identity then. Works after `to_empty`.
        """
        if self.frozen.is_meta:
            return
        with torch.device(self.frozen.device):
            matrix = _initial_matrix(self.size, tuple(self.batch_shape), self._init)
            write_state([self], self._state_of(matrix.to(self.frozen)))
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        seed = torch.randint(1 << 62, tuple(self.batch_shape), dtype=torch.int64, device="cpu")
        self.seed.copy_(seed)
        self.draws.zero_()
        self.reset()

    def forward(self) -> Tensor:
        """Ã in the dtype of the module, for `torch.nn.utils.parametrize`."""
        return self.dense().to(self.u.dtype)

    def right_inverse(self, matrix: Tensor) -> tuple[()]:
        """As `assign`, for `torch.nn.utils.parametrize`; the originals it asks for are none."""
        self.assign(matrix)
        return ()

    def _restarted(self, state: State, where: Tensor) -> State:
        """u = 0 and v drawn anew for the matrices in `where`."""
        seed, draws, v = state["seed"], state["draws"], state["v"]
        # All directions are in the first basis already: in another one, an optimizer's averages of
        # squares would be those of other directions.
        stays = self.draw == "basis" and self.rank == self.size
        counter = torch.zeros_like(draws) if stays else draws
        fresh = _DRAWS[self.draw](seed, counter, (self.size, self.rank))
        fresh = (fresh * (self._scale / math.sqrt(self.rank))).to(v.dtype)
        column = where[..., None, None]
        return {
            "u": torch.where(column, 0.0, state["u"]),
            "v": torch.where(column, fresh, v),
            "draws": draws + where,
        }

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
        stacked = copy.deepcopy(matrices[0])
        for name, own in (*stacked.named_parameters(), *stacked.named_buffers()):
            value = torch.stack([getattr(matrix, name).detach() for matrix in matrices])
            is_parameter = isinstance(own, nn.Parameter)
            setattr(
                stacked, name, nn.Parameter(value, own.requires_grad) if is_parameter else value
            )
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
            self.draw,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.double()` and `.cuda()` call."""
        before = self.frozen.dtype
        stored = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.frozen.dtype != storage_dtype(self.frozen.dtype):
            # What the module's dtype cannot carry: A, A⁻¹ and ln|det A| stay in float32.
            for name, buffer in stored.items():
                moved = self._buffers[name]
                if buffer is not None and moved is not None and buffer.is_floating_point():
                    dtype = storage_dtype(moved.dtype)
                    self._buffers[name] = buffer.to(device=moved.device, dtype=dtype)
        finer = torch.finfo(self.frozen.dtype).eps < torch.finfo(before).eps
        if finer and not self.frozen.is_meta:
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
        repaired = self._belonging(state_dict, prefix)
        saved = {prefix + n: value for n, value in repaired.items() if prefix + n in state_dict}
        super()._load_from_state_dict({**state_dict, **saved}, prefix, local_metadata, *args)
        # What was not saved is not loaded, and would stay that of the matrix before.
        with torch.no_grad():
            for name, value in repaired.items():
                if prefix + name not in state_dict:
                    getattr(self, name).copy_(value)

    @torch.no_grad()
    def _belonging(self, state_dict: dict[str, Any], prefix: str) -> State:
        """What of a state to be loaded does not belong to its A, computed anew; by name."""
        names = [
            name for name in self._buffers if isinstance(state_dict.get(prefix + name), Tensor)
        ]
        found = {name: state_dict[prefix + name] for name in names}
        if "frozen" not in found or found["frozen"].is_meta or self.frozen.is_meta:
            return {}
        if any(found[name].shape != getattr(self, name).shape for name in names):
            return {}  # torch says so itself
        state = {
            name: found.get(name, getattr(self, name)).to(getattr(self, name))
            for name in self._buffers
        }
        layer = prefix.rstrip(".") or type(self).__name__
        if not bool(state["frozen"].isfinite().all()):
            raise RuntimeError(f"{layer}: frozen of the state is not finite: nothing was loaded")
        error = error_of_state(*self._stored(state))
        if bool(error.is_right(self.size, self.frozen.dtype).all()):
            return {}
        fresh, _ = self._corrected(state)
        if not bool(
            error_of_state(*self._stored({**state, **fresh}))
            .is_right(self.size, self.frozen.dtype)
            .all()
        ):
            raise RuntimeError(
                f"{layer}: frozen of the state is singular to working precision or not in the "
                "feasible set: nothing was loaded"
            )
        warnings.warn(
            f"{layer}: what the state keeps beside its matrix (inverse, log-determinant) does not "
            "belong to it and was computed anew",
            stacklevel=2,
        )
        return fresh
