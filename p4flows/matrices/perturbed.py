"""PerturbedMatrix: a frozen matrix with a small trainable perturbation (paper, Section 2.1)."""

import abc
import contextlib
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from p4flows.arguments import check_floating, check_positive_int, is_int
from p4flows.matrices.derived import current, fingerprint
from p4flows.matrices.directions import basis_columns, standard_normal
from p4flows.matrices.error import MatrixError, error_of_state
from p4flows.matrices.merge import (
    Merged,
    MergeOutcome,
    State,
    changed,
    merge_together,
    read_state,
    write_state,
)
from p4flows.matrices.precision import (
    dtype_of_outputs,
    full_precision,
    is_autocast,
    storage_dtype,
)

# Writes to u without a merge after which a matrix counts as forgotten; a step is one or two.
_FORGOTTEN_AFTER = 2000


class NotMergedWarning(UserWarning):
    """u of a P4 layer has been trained for long, and nothing has merged it.

    A layer whose rank k is below n then stays within rank k of the matrix it started from. A
    forgotten `MergeHook` is one cause, a hook that is bound to another optimizer is another.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", NotMergedWarning)  # where this is meant
    """


class SingularError(ValueError):
    """A was written from outside and is not in S: nothing can be derived from it."""


def is_transformed() -> bool:
    """Whether the compiler or torch.func has to see each operation."""
    # torch has no public way to ask for the second.
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


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
    optimizer trains u; `merge` carries it into A (equations 1 and 2) and starts again from u = 0
    and a fresh v. Neither `train`, `eval` nor reading changes what the matrix is.

    What is derived from A is stored beside it, with a fingerprint of A. Whoever writes A from
    outside (an average of weights, `copy_`, `load_state_dict`) need not care: what no longer
    belongs to A is derived again when the matrix is next read, in O(n³).

    A new property is a subclass that implements the abstract methods and sets `_deciding` and
    `_draw`.

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
        v: parameter, same shape.
        frozen: buffer, A.
        fingerprint: buffer, int64 of shape `batch_shape`: of what the other buffers belong to.
        seed: buffer, int64 of shape `batch_shape`: each draw of v is a function of it and `draws`.
        draws: buffer, int64 of shape `batch_shape`: how often v has been drawn.
        kind: buffer, int64: the perturbation, and how v is drawn, so that a state has both.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the size or rank is out of range, or init is of another shape, not finite
            or outside of S.
    """

    u: nn.Parameter
    v: nn.Parameter
    frozen: Tensor
    fingerprint: Tensor
    seed: Tensor
    draws: Tensor
    kind: Tensor

    # What decides the rest of the state, and what a state_dict has of that rest.
    _deciding: tuple[str, ...] = ("frozen",)
    _derived: tuple[str, ...] = ()
    # The name of its `Derivation`, for compiled graphs.
    _derivation: str
    # How v is drawn without a `MergeHook`: independently from a normal distribution, or as the next
    # columns of random orthogonal bases.
    _deals_basis = False
    # The length of v, relative to E[v vᵀ] = I, and whether an optimizer trains it.
    _scale = 1.0
    _trains_v = True
    # The tensors that decide and their versions, when the state was last known to belong to them.
    _seen: tuple[tuple[Tensor, int | None], ...] = ()
    _sum: float | None = None
    # A weak reference to the `MergeHook` that merges it, if any.
    _hook: "weakref.ref[Any] | None" = None
    # The version of u after the last merge, and how many more mean that it is forgotten.
    _merged_at = 0
    _forgotten_after = _FORGOTTEN_AFTER

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
            dtype = initial.dtype if dtype is None else dtype
            frozen = initial.to(storage_dtype(dtype))
            self.register_buffer("fingerprint", frozen.new_zeros(batch_shape, dtype=torch.int64))
            for name, value in self._state_of(frozen, initial.dtype).items():
                self.register_buffer(name, value)
            self.u = nn.Parameter(frozen.new_zeros(*batch_shape, size, rank, dtype=dtype))
            self.v = nn.Parameter(torch.zeros_like(self.u))
            self.register_buffer("seed", frozen.new_zeros(batch_shape, dtype=torch.int64))
            self.register_buffer("draws", torch.zeros_like(self.seed))
            self.register_buffer("kind", frozen.new_zeros((), dtype=torch.int64))
            self._register_more()
            self._start()
        self._init = init if isinstance(init, str) else "identity"
        self.to(device)

    def _register_more(self) -> None:
        """Buffers of a subclass that are known when u and v are."""

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

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Ã x + bias for rows x.

        Args:
            x: shape `(*batch_shape, N, n)`.
            bias: shape `(*batch_shape, n)` or None.

        Returns:
            Tensor of the shape of x.
        """
        return self.multiply_and_logabsdet(x, bias)[0]

    def solve(self, y: Tensor) -> Tensor:
        """Ã⁻¹ y for rows y of shape `(*batch_shape, N, n)`."""
        return self.solve_and_logabsdet(y)[0]

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
        return self._pass(self._multiply, x, bias)

    def solve_and_logabsdet(self, y: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What a layer returns in the inverse direction.

        Args:
            y: shape `(*batch_shape, N, n)`.
            bias: b, shape `(*batch_shape, n)`, or None.

        Returns:
            Ã⁻¹ (y − b) of the shape of y and −ln|det Ã| of shape `(*batch_shape, N)`.
        """
        return self._pass(self._solve, y, bias)

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
    def penalty(self) -> Tensor:
        """Penalty on ill-conditioned perturbations, shape `batch_shape`, differentiable."""

    @torch.no_grad()
    def correct(self) -> Tensor:
        """Rectify the rounding errors of past merges, in O(n³).

        Returns:
            Boolean tensor of shape `batch_shape`: what had to be rebuilt from A.
        """
        before = read_state([self])
        with full_precision(self.frozen.device):
            corrected, rescued = self._corrected(before)
        state = self._completed({**before, **corrected})
        # What could not be corrected does not belong to A still.
        right = self._is_in_set(state)
        state["fingerprint"] = torch.where(right, state["fingerprint"], before["fingerprint"])
        write_state([self], changed(state, before))
        if not bool(right.all()):
            self._seen = ()
        return rescued

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
        with contextlib.suppress(SingularError):
            self._refresh()
        return error_of_state(*self._stored(read_state([self])))

    def merge(self, force: bool = False) -> Tensor:
        """Merge the perturbation into the frozen matrix: A ← R_B(A), then B ← B₀.

        The perturbed matrix, its inverse and its determinant do not change beyond rounding; what
        the stored inverse lost is noticed by a probe and derived again. All is computed before
        anything is written. A perturbation that is not finite is reset and not merged.

        Args:
            force: merge also what is outside its bounds (N_force of the paper's Appendix B). What
                would be singular to working precision is reset instead.

        Returns:
            Boolean tensor of shape `batch_shape`: what was merged.
        """
        return self.attempt_merge(force).merged

    def attempt_merge(self, force: bool = False) -> MergeOutcome:
        """As `merge`, with the reasons.

        Args:
            force: as in `merge`.

        Returns:
            What was merged, what of it by force, and what was reset.
        """
        return merge_together([self], force).outcome

    @torch.no_grad()
    def reset(self) -> None:
        """Throw the perturbation away: u ← 0, v ← a fresh draw; A stays."""
        self._refresh()
        self._write({}, torch.ones_like(self.draws, dtype=torch.bool))

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
        matrix = _initial_matrix(self.size, self.batch_shape, init)
        state = self._state_of(matrix.to(self.frozen), matrix.dtype)
        self._write(state, torch.ones_like(self.draws, dtype=torch.bool))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin again, as just constructed: A, u = 0, and a v from a fresh seed.

        An `init` that was a tensor is not kept: A is the identity then. Works after `to_empty`.
        """
        if self.frozen.is_meta:
            return
        with torch.device(self.frozen.device):
            matrix = _initial_matrix(self.size, tuple(self.batch_shape), self._init)
            write_state([self], self._state_of(matrix.to(self.frozen), matrix.dtype))
        self._start()

    def forward(self) -> Tensor:
        """Ã in the dtype of the module, for `torch.nn.utils.parametrize`."""
        return self.dense().to(self.u.dtype)

    def right_inverse(self, matrix: Tensor) -> tuple[()]:
        """As `assign`, for `torch.nn.utils.parametrize`; the originals it asks for are none."""
        self.assign(matrix)
        return ()

    def extra_repr(self) -> str:
        """Size, batch shape and rank, for `repr`."""
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"size={self.size}{batch}, rank={self.rank}"

    @abc.abstractmethod
    def _multiply(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """`multiply_and_logabsdet` in the dtype of A, without autocast."""

    @abc.abstractmethod
    def _solve(self, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """`solve_and_logabsdet` in the dtype of A, without autocast."""

    @abc.abstractmethod
    def _stored(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, A⁻¹, the sign and ln|det A| of a state."""

    @abc.abstractmethod
    def _state_of(self, matrix: Tensor, dtype: torch.dtype) -> State:
        """The buffers that store an A that came in some dtype; ValueError when it is not in S."""

    @abc.abstractmethod
    def _merged(self, state: State, candidates: Tensor, force: bool) -> Merged:
        """What a merge makes of a state; it writes nothing.

        Candidates have a finite perturbation. What is not merged keeps its values.
        """

    @abc.abstractmethod
    def _corrected(self, state: State) -> tuple[State, Tensor]:
        """What a correction makes of a state, and what had to be rebuilt; it writes nothing."""

    @abc.abstractmethod
    def _rebuilt(self, frozen: Tensor) -> State:
        """What is stored of a matrix that is near S, "frozen" too where it is not in S."""

    @abc.abstractmethod
    def _is_in_set(self, state: State) -> Tensor:
        """Where a rebuilt state is that of a matrix in S, boolean of the batch shape."""

    def _completed(self, state: State) -> State:
        """A state, with what has to follow a change of A or v."""
        return {**state, "fingerprint": self._fingerprint_of(state)}

    def _fingerprint_of(self, state: State) -> Tensor:
        dtype = state["frozen"].dtype
        # The orthogonal A decides, and is derived as well.
        names = dict.fromkeys((*self._deciding, *self._derived))
        return fingerprint([state[name].to(dtype) for name in names], state["draws"].dim())

    def _layout(self) -> tuple[Any, ...]:
        """What two matrices must have in common to be merged by the same calls."""
        return (type(self), tuple(self.u.shape), self.u.dtype, self.v.dtype, self.u.device)

    def _pass(
        self,
        direction: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
        rows: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Rows in the dtype of A through a direction, and back in their own."""
        check_floating(rows)
        frozen, u, _ = self._tensors()
        device, own = frozen.device, u.dtype
        if (
            rows.dtype == own == frozen.dtype
            and rows.device == device
            and not is_autocast(device.type)
        ):
            return direction(rows, bias)
        dtype = dtype_of_outputs(rows, own, device)
        with full_precision(device):
            outputs, logabsdet = direction(
                rows.to(frozen.dtype), None if bias is None else bias.to(frozen.dtype)
            )
        return outputs.to(dtype), logabsdet

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, u and v, from where a module keeps them: faster than its attributes, in each step."""
        return self._buffers["frozen"], self._parameters["u"], self._parameters["v"]  # type: ignore[return-value]

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, and u and v in its dtype, in which all is computed."""
        frozen, u, v = self._tensors()
        if u.dtype == frozen.dtype:
            return frozen, u, v
        return frozen, u.to(frozen.dtype), v.to(frozen.dtype)

    def _current(self, *names: str) -> list[Tensor]:
        """Tensors that are stored beside A, and belong to it."""
        if torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
            stored = [getattr(self, name) for name in names]
            state = read_state([self])
            deciding, derived = (
                [state[name].to(self.frozen.dtype) for name in group]
                for group in (self._deciding, self._derived)
            )
            return current(
                self._derivation, " ".join(names), stored, self.fingerprint, deciding, derived
            )
        self._refresh()
        if self.training:
            self._warn_if_forgotten()
        return [self._buffers[name] for name in names]  # type: ignore[misc]

    def _is_seen(self) -> bool:
        """Whether A is the very tensor, unwritten, that the state was last known to belong to."""
        # Called in each step, and written for it.
        for name, (tensor, version) in zip(self._deciding, self._seen, strict=False):
            own = self._buffers[name] if name == "frozen" else self._parameters[name]
            if own is not tensor or version is None or own._version != version:
                return False
        return bool(self._seen)

    def _refresh(self, thorough: bool | None = None) -> None:
        """Derive again what no longer belongs to A; thorough where it is not being trained."""
        is_seen = self._is_seen()
        if thorough is None:
            thorough = not (self.training and torch.is_grad_enabled())
        if (is_seen and not thorough) or self._is_out_of_reach():
            return
        # An average of weights is read without gradients, and may have been written through
        # `.data`, which versions do not show. Their sum does.
        found = self._sum_of_what_decides()
        if is_seen and self._sum == found:
            return
        with torch.no_grad(), full_precision(self.frozen.device):
            if not torch.equal(self._fingerprint_of(read_state([self])), self.fingerprint):
                self._derive()
                found = self._sum_of_what_decides()
        self._look()
        self._sum = found

    def _sum_of_what_decides(self) -> float:
        frozen, _, v = self._tensors()
        total = frozen.sum()
        # At full rank v stays.
        if "v" in self._deciding and self.rank < self.size:
            total = total + v.sum()
        return total.item()

    def _is_out_of_reach(self) -> bool:
        """Whether nothing can be decided by the numbers: the compiler, torch.func, a CUDA graph."""
        frozen, *factors = self._tensors()
        return (
            torch.compiler.is_compiling()
            or frozen.is_meta
            or any(map(torch._C._functorch.is_functorch_wrapped_tensor, (frozen, *factors)))
            or (frozen.is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def _derive(self) -> None:
        before = read_state([self])
        state, refusal = self._rederived(before)
        if refusal:
            raise SingularError(f"{self.extra_repr()} was written from outside, and {refusal}")
        write_state([self], changed(state, before))

    def _rederived(self, state: State) -> tuple[State, str]:
        """A state whose A decides all else, or why it is refused."""
        frozen = state["frozen"]
        if not bool(frozen.isfinite().all()):
            return state, "its matrix is not finite"
        state = {**state, **self._rebuilt(frozen)}
        if not bool(self._is_in_set(state).all()):
            return state, "its matrix is singular to working precision"
        return self._completed(state), ""

    def _look(self) -> None:
        """Remember that the state has just been written, and belongs to A as it is now."""
        self._seen = tuple(
            (tensor, None if tensor.is_inference() else tensor._version)
            for tensor in (getattr(self, name) for name in self._deciding)
        )
        self._merged_at = 0 if self.u.is_inference() else self.u._version
        self._sum = None

    def _warn_if_forgotten(self) -> None:
        """Once, when an optimizer has stepped u for long and nothing has merged it."""
        u: Tensor = self._parameters["u"]  # type: ignore[assignment]
        if u.is_inference() or u._version - self._merged_at <= self._forgotten_after:
            return
        if u.requires_grad and torch.is_grad_enabled():
            self._forgotten_after = 1 << 62
            low = f", which stays within rank {self.rank} of where it was"
            warnings.warn(
                f"u of a P4 layer ({self.extra_repr()}) has been written {_FORGOTTEN_AFTER} times "
                f"without a merge{low if self.rank < self.size else ''}: "
                "make MergeHook(module, optimizer) before the training",
                NotMergedWarning,
                stacklevel=2,
            )

    def _start(self) -> None:
        with torch.no_grad():
            seed = torch.randint(1 << 62, tuple(self.batch_shape), dtype=torch.int64, device="cpu")
            self.seed.copy_(seed)
            self.draws.zero_()
            self.kind.fill_(self._kind_of(self._deals_basis))
            self._write({}, torch.ones_like(self.draws, dtype=torch.bool))

    def _write(self, changes: State, restarted: Tensor) -> None:
        """Write a state with some perturbations restarted."""
        before = read_state([self])
        state = {**before, **changes}
        state.update(self._restarted(state, restarted))
        write_state([self], changed(self._completed(state), before))

    def _restarted(self, state: State, where: Tensor) -> State:
        """u = 0 and v drawn again for the matrices in `where`."""
        seed, draws, v = state["seed"], state["draws"], state["v"]
        fresh = self._directions(seed, torch.zeros_like(draws) if self._keeps_v else draws)
        fresh = (fresh * (self._scale / math.sqrt(self.rank))).to(v.dtype)
        column = where[..., None, None]
        return {
            "u": torch.where(column, 0.0, state["u"]),
            "v": torch.where(column, fresh, v),
            "draws": draws + where,
        }

    def _directions(self, seed: Tensor, draws: Tensor) -> Tensor:
        """Columns of length √n in the mean, float64."""
        draw = basis_columns if self._is_basis else standard_normal
        return draw(seed, draws, (self.size, self.rank))

    @torch.no_grad()
    def _draw_as(self, basis: bool) -> None:
        """Draw v so from now on, and at once where it is still the first one and u = 0."""
        if basis == self._is_basis or self.frozen.is_meta:
            return
        self.kind.fill_(self._kind_of(basis))
        untouched = (self.draws == 1) & (self.u == 0).flatten(-2).all(-1)
        self._write({"draws": self.draws - untouched.long()}, untouched)

    def _kind_of(self, basis: bool) -> int:
        return int(basis)

    @property
    def _is_basis(self) -> bool:
        return bool(int(self.kind) % 2)

    @property
    def _keeps_v(self) -> bool:
        """Whether all directions are in the first v, which then stays.

        In another basis, an optimizer's averages of squares would be those of other directions.
        """
        return self.rank == self.size and self._is_basis

    def train(self, mode: bool = True) -> Self:
        """As in torch; what is stored is compared with A when the matrix is next read."""
        self._seen = ()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # Of these very tensors, and of the optimizer that steps them.
        own = ("_seen", "_sum", "_merged_at", "_hook")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.double()` and `.cuda()` call."""
        stored = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.frozen.dtype != storage_dtype(self.frozen.dtype):
            # What the module's dtype cannot carry: A, A⁻¹ and ln|det A| stay in float32.
            for name, buffer in stored.items():
                moved = self._buffers[name]
                if buffer is not None and moved is not None and buffer.is_floating_point():
                    dtype = storage_dtype(moved.dtype)
                    self._buffers[name] = buffer.to(device=moved.device, dtype=dtype)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As torch does, and what does not belong to the A that is loaded is derived from it."""
        assigned = local_metadata.get("assign_to_params_buffers", False)
        fresh, refusal = self._belonging(state_dict, prefix, assigned)
        if refusal:
            layer = prefix.rstrip(".") or type(self).__name__
            error_msgs.append(f"{layer} was not loaded, all else was: {refusal}")
            return
        known = {prefix + n: value for n, value in fresh.items() if prefix + n in state_dict}
        super()._load_from_state_dict(
            {**state_dict, **known},
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        for name in fresh.keys() - {key.removeprefix(prefix) for key in known}:
            own = getattr(self, name)
            if own.is_meta or own.dtype != fresh[name].dtype:
                setattr(self, name, fresh[name])
            else:
                own.copy_(fresh[name])
        if fresh:
            self._look()

    def _belonging(
        self, state_dict: dict[str, Any], prefix: str, assigned: bool
    ) -> tuple[State, str]:
        """What belongs to the A that a state brings, or why that is refused."""
        own = read_state([self])
        saved = {
            name: value.detach()
            for name in own
            if isinstance(value := state_dict.get(prefix + name), Tensor)
        }
        if any(value.shape != own[name].shape for name, value in saved.items()):
            return {}, ""  # torch says so itself
        state = {**own, **saved}
        if not saved.keys() & {*self._deciding, *self._derived} or state["frozen"].is_meta:
            return {}, ""
        like = state["frozen"] if assigned else own["frozen"]
        for name, value in state.items():
            if value.is_meta:
                state[name] = torch.zeros_like(value, device=like.device)
            elif value.is_floating_point():
                state[name] = value.to(like)
        completed = self._completed(state)
        is_whole = all(name in saved for name in self._derived) and "fingerprint" in saved
        if is_whole and torch.equal(completed["fingerprint"], state["fingerprint"].to(like.device)):
            rest = completed.keys() - saved.keys() - {"u", "v", "seed", "draws"}
            return {name: completed[name] for name in rest}, ""
        state, refusal = self._rederived(state)
        rest = state.keys() - {"u", "v", "seed", "draws"}
        return {name: state[name] for name in rest}, refusal
