"""MergeHook: decides when perturbed matrices merge, from inside the optimizer's step."""

import dataclasses
import threading
import warnings
import weakref
from collections import defaultdict
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from p4flows.arguments import check_module
from p4flows.matrices import MergeOutcome, PerturbedMatrix
from p4flows.matrices.error import CONDITION_EPS
from p4flows.matrices.merge import MergeReport, merge_together
from p4flows.merging.optimizer_state import follow_merge
from p4flows.merging.optimizers import (
    SavedState,
    chain_of,
    held,
    inner_of,
    is_at_rest,
    layout_of,
    listen,
    stop_listening,
)
from p4flows.merging.processes import (
    Comparison,
    group_of,
    refuse_flattened,
    refuse_join,
    refuse_what_cannot_merge,
)
from p4flows.merging.schedule import MergeStats, Schedule, Turn

# A stack of small matrices merges in the time of one; copying large ones into a stack and back
# costs more than the calls it saves (measured: the break-even is between n = 128 and n = 256).
_STACK_UP_TO = 128

_COUNTED = ("merged", "forced", "reset", "corrected", "rescued")


@dataclasses.dataclass
class _Attached:
    """What an optimizer has to do with the matrices."""

    layout: tuple[Any, ...]
    # None where it does not step them, or only through an optimizer inside of it.
    saved: SavedState | None
    # Its own references to optimizers around it, which may keep copies of the weights.
    around: list[weakref.ref[Any]]


class MergeHook:
    """Merges every `PerturbedMatrix` of a module from inside `optimizer.step()` (Algorithm 1).

    Any training loop works unchanged. Without an optimizer the hook attaches itself to whichever
    one steps the module's u and v, inside another library too, and to its successor with the counts
    that it has. The counts travel in `optimizer.state_dict()`, so that a checkpoint of module and
    optimizer resumes exactly.

    You need not keep a reference to the hook. A newer hook takes its matrices over from an older
    one. It can be pickled; a copy that is made together with the module drives the copied module.

    Args:
        module: holds the perturbed matrices, at any depth.
        optimizer: trains their u and v, any of `torch.optim`, also inside a wrapper (`.optimizer`);
            other parameters are not touched. The hook is bound to it. None: whichever optimizer
            steps u and v, which has to hold all of them that are to be trained.
        every: N, optimizer steps between merges; steps that a `GradScaler` skipped do not count.
        force_every: N_force, merges (not steps) between forced ones; None is never.
        correct_every: N_correct, merges (not steps) between corrections of the inverse; None is
            never.
        compare_processes: whether processes that train the same module are compared at each merge,
            by one reduction of a few numbers: those of a `DistributedDataParallel` in the module,
            else all of `torch.distributed`. False where they train different modules.
        paper: whether v is drawn independently each time, and its optimizer state starts again at
            each merge. By default v is dealt in turn from the columns of random orthogonal bases,
            and momentum that points along the old v is carried over to the new one.

    Attributes:
        stats: a `MergeStats`.

    Raises:
        TypeError: when an argument has the wrong type, u and v are sharded, the optimizer is a
            `ZeroRedundancyOptimizer`, or (from a step) it keeps a copy of the weights that a merge
            cannot carry over.
        RuntimeError: from `optimizer.step()`, when processes had drifted apart at the last merge.
        ValueError: when an interval is not positive, the module has no perturbed matrix that is to
            be trained, or the optimizer does not hold its u and v; the last also from the first
            step of an optimizer that holds only some of them.

    Example:
        >>> from p4flows import P4InvTransform
        >>> layer = P4InvTransform(2)
        >>> hook = MergeHook(layer, every=10)
        >>> optimizer = torch.optim.Adam(layer.parameters())
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     loss = (layer(torch.ones(1, 2))[0] - 3).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        >>> hook.stats.merged
        2
    """

    _bound: weakref.ref[Optimizer] | None
    _step_handle: RemovableHandle | None

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        every: int = 50,
        force_every: int | None = 10,
        correct_every: int | None = 50,
        compare_processes: bool = True,
        paper: bool = False,
    ) -> None:
        check_module(module)
        chain = chain_of(optimizer)
        inner = chain[-1]
        if inner is not None and not isinstance(inner, Optimizer):
            raise TypeError(f"optimizer must be a torch Optimizer, got {type(optimizer).__name__}")
        self._schedule = Schedule(every, force_every, correct_every)
        refuse_flattened(module)
        matrices = {
            name or type(found).__name__: found
            for name, found in module.named_modules()
            if isinstance(found, PerturbedMatrix)
        }
        if not any(map(_is_trained, matrices.values())):
            raise ValueError("module has no P4 layer to train: there is nothing to merge")
        refuse_what_cannot_merge(matrices, inner)
        if inner is not None:
            _check_held(matrices, inner)
        for matrix in matrices.values():
            matrix._draw_as(basis=not paper)
        self.stats = MergeStats()
        self._paper = paper
        self._warned: set[str] = set()
        self._skipped: Tensor | None = None
        self._compare_processes = compare_processes
        self._start(matrices, module)
        self._drive(list(matrices.values()))
        if inner is None:
            listen(self._hear)
        else:
            self._bound = weakref.ref(inner)
            self._step_handle = inner.register_step_post_hook(self._after_own_step)
            around = [weakref.ref(each) for each in chain[:-1] if hasattr(each, "__weakref__")]
            self._attach(inner, around)

    @classmethod
    def paper(
        cls,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        every: int = 100,
        force_every: int | None = 10,
        correct_every: int | None = 50,
    ) -> Self:
        """A hook with the intervals of the paper, and `paper=True`.

        Args:
            module: as in the constructor.
            optimizer: as in the constructor.
            every: N; 100 in the paper's Section 4.3, 10 in Section 4.2.
            force_every: N_force.
            correct_every: N_correct.

        Returns:
            The hook.
        """
        return cls(
            module,
            optimizer,
            every=every,
            force_every=force_every,
            correct_every=correct_every,
            paper=True,
        )

    @property
    def every(self) -> int:
        """N, optimizer steps between merges."""
        return self._schedule.every

    @property
    def force_every(self) -> int | None:
        """N_force, merges between forced ones."""
        return self._schedule.force_every

    @property
    def correct_every(self) -> int | None:
        """N_correct, merges between corrections."""
        return self._schedule.correct_every

    def is_active(self) -> bool:
        """Whether the next step of an optimizer that holds u and v is counted by this hook.

        Not so when it was removed, a newer hook took its matrices over, the optimizer that it is
        bound to is gone, or its matrices are: those of a copy are, when it was copied without the
        module.
        """
        if self._bound is not None and self._bound() is None:
            return False
        return bool(self._driven(self._alive()))

    def remove(self) -> None:
        """Take the hook off its matrices and optimizers; the matrices keep their state."""
        for matrix in self._driven(self._alive()).values():
            matrix._hook = None
        self._leave()

    @torch.no_grad()
    def merge(self, force: bool = False) -> bool:
        """Merge now, whatever the count: at the end of a training, so that u = 0.

        Args:
            force: merge also what is outside its bounds.

        Returns:
            Whether every perturbation went into its matrix.

        Raises:
            RuntimeError: when the hook drives no matrix: see `is_active`.
        """
        if not self._driven(self._trained()):
            raise RuntimeError(
                "this hook drives no matrix: it was removed, a newer MergeHook took over, or the "
                "module is gone"
            )
        return self._merge(Turn(force, correct=False))

    def penalty(self, strength: float) -> Tensor:
        """The penalty C_p·g(u, v) of Appendix A, summed over all matrices.

        Args:
            strength: C_p, 0.1 in the paper's Table 1.

        Returns:
            A differentiable scalar to add to the loss, on the device of the first matrix.
        """
        penalties = [matrix.penalty().sum() for matrix in self._trained().values()]
        return strength * torch.stack([each.to(penalties[0]) for each in penalties]).sum()

    def state_dict(self) -> dict[str, Any]:
        """Counters and statistics; the matrices keep the rest in the module's `state_dict`."""
        state = {**self._schedule.state_dict(), "stats": dict(self.stats)}
        return state if self._skipped is None else {**state, "skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count of steps and merges where `state_dict()` was taken.

        Not needed where the optimizer's own state is loaded, which has it; this one wins.
        """
        self._take_over(state_dict)
        # An optimizer that is not there yet may have a state of its own to offer.
        self._is_loaded = not self._attached

    def __repr__(self) -> str:
        return (
            f"MergeHook({len(self._trained())} matrices, every={self.every}, "
            f"force_every={self.force_every}, correct_every={self.correct_every}"
            f"{', paper=True' if self._paper else ''})"
        )

    def _start(self, matrices: dict[str, PerturbedMatrix], module: nn.Module | None) -> None:
        """What a copy does not share."""
        # Weak, because optimizers hold the hook: matrices shall go when the user lets go of them.
        self._references = {
            name: weakref.ref(matrix, self._on_end) for name, matrix in matrices.items()
        }
        self._module = None if module is None else weakref.ref(module)
        self._bound = None
        self._step_handle = None
        self._attached: weakref.WeakKeyDictionary[Optimizer, _Attached] = (
            weakref.WeakKeyDictionary()
        )
        # Optimizers of other threads are heard of as well.
        self._lock = threading.Lock()
        self._is_loaded = False
        self._is_prepared = False
        self._comparison: Comparison | None = None

    def __getstate__(self) -> dict[str, Any]:
        names = ("stats", "_schedule", "_paper", "_warned", "_skipped", "_compare_processes")
        state = {name: getattr(self, name) for name in names}
        matrices = self._alive()
        # A copy does not share what goes on counting.
        state["stats"] = dataclasses.replace(self.stats)
        return {**state, "matrices": (matrices, list(self._driven(matrices)))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        matrices, driven = state.pop("matrices")
        vars(self).update(state)
        self._start(matrices, None)
        free = [matrices[name] for name in driven if matrices[name]._hook is None]
        self._drive(free)
        if free:
            listen(self._hear)

    def _drive(self, matrices: list[PerturbedMatrix]) -> None:
        """Become the only hook of some matrices."""
        earlier = [each() for each in (matrix._hook for matrix in matrices) if each is not None]
        for matrix in matrices:
            matrix._hook = weakref.ref(self)
            matrix._forgotten_after = max(matrix._forgotten_after, 10 * self.every)
        for hook in earlier:
            if hook is not None and not hook._driven(hook._alive()):
                hook._leave()

    def _leave(self) -> None:
        stop_listening(self._hear)
        if self._step_handle is not None:
            self._step_handle.remove()
        for attached in self._attached.values():
            if attached.saved is not None:
                attached.saved.remove()
        self._attached.clear()
        if self._comparison is not None:
            self._comparison.close()
            self._comparison = None

    def _on_end(self, reference: object) -> None:
        """A matrix is gone."""
        if not self._alive():
            self._leave()

    def _alive(self) -> dict[str, PerturbedMatrix]:
        found = ((name, reference()) for name, reference in self._references.items())
        return {name: matrix for name, matrix in found if matrix is not None}

    def _trained(self) -> dict[str, PerturbedMatrix]:
        return {name: matrix for name, matrix in self._alive().items() if _is_trained(matrix)}

    def _driven(self, matrices: dict[str, PerturbedMatrix]) -> dict[str, PerturbedMatrix]:
        """Those that no newer hook has taken over."""
        return {
            name: matrix
            for name, matrix in matrices.items()
            if matrix._hook is not None and matrix._hook() is self
        }

    def _take_over(self, state: dict[str, Any]) -> None:
        self._schedule.load_state_dict(state)
        self._skipped = state.get("skipped")
        self.stats = MergeStats(**state["stats"])

    def _take_over_from_optimizer(self, state: dict[str, Any]) -> None:
        if not self._is_loaded:
            self._take_over(state)

    def _hear(self, optimizer: Optimizer) -> None:
        """Any optimizer has taken a step."""
        attached = self._attached.get(optimizer)
        if attached is None or attached.layout != layout_of(optimizer):
            attached = self._attach(optimizer, [])
        if attached.saved is not None:
            self._after_step(optimizer)

    def _attach(self, optimizer: Optimizer, around: "list[weakref.ref[Any]]") -> _Attached:
        """Find out what an optimizer has to do with the matrices."""
        known = self._attached.get(optimizer)
        saved = None if known is None else known.saved
        around = around if known is None else known.around
        matrices = self._driven(self._trained())
        trained = _trained_parameters(matrices)
        inner = inner_of(optimizer)
        if held(optimizer).isdisjoint(map(id, trained)):
            saved = None
        elif inner is not None:
            saved = None
            if inner in self._attached:
                self._attached[inner].around.append(weakref.ref(optimizer))
        elif saved is None:
            refuse_what_cannot_merge(matrices, optimizer)
            _check_held(matrices, optimizer)
            saved = SavedState(
                optimizer, trained[0], self.state_dict, self._take_over_from_optimizer
            )
            self._is_loaded = False
        attached = _Attached(layout_of(optimizer), saved, around)
        with self._lock:
            self._attached[optimizer] = attached
        return attached

    def _after_own_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._after_step(optimizer)

    def _after_step(self, optimizer: Optimizer) -> None:
        if is_at_rest(optimizer) and not any(
            parameter.grad is not None and bool(parameter.grad.any())
            for parameter in _trained_parameters(self._trained())
        ):
            # torch.distributed.checkpoint takes such a step to see what the state looks like.
            return
        if not self._is_prepared:
            self._prepare()
        if (found_inf := getattr(optimizer, "found_inf", None)) is not None:
            # A fused optimizer skips inside of its kernel; reading that at each step would wait
            # for the device each time.
            skipped = (found_inf != 0).to(torch.int64)
            self._skipped = skipped if self._skipped is None else self._skipped + skipped
        if self._schedule.step() and not self._discount_skipped():
            turn = self._schedule.turn()
            if self._comparison is not None:
                refuse_join(None if self._module is None else self._module())
                self._comparison.start(self._driven(self._trained()), self._schedule.steps)
            self._merge(turn)

    def _prepare(self) -> None:
        """At the first step, when all processes are here."""
        self._is_prepared = True
        group = group_of(None if self._module is None else self._module())
        if self._compare_processes and group is not None:
            self._comparison = Comparison(group)

    def _discount_skipped(self) -> int:
        """Take back the steps that a GradScaler skipped; their number."""
        if self._skipped is None:
            return 0
        skipped, self._skipped = int(self._skipped), None
        self._schedule.steps -= skipped
        return skipped

    @torch.no_grad()
    def _merge(self, turn: Turn) -> bool:
        matrices = self._driven(self._trained())
        refuse_what_cannot_merge(matrices, None)
        complete = True
        for group in _groups(matrices):
            report = merge_together(list(group.values()), turn.force, turn.correct)
            # All that the host has to know of the group, in one read.
            numbers = _for_host(report, len(group))
            self._count(numbers)
            complete = complete and bool((numbers["merged"] > 0).all())
            self._follow(group, report, numbers)
            self._warn_of_resets(group, numbers["reset"])
            self._warn_of_condition(group, numbers["condition"])
        return complete

    def _follow(
        self, group: dict[str, PerturbedMatrix], report: MergeReport, numbers: dict[str, Tensor]
    ) -> None:
        """Tell every optimizer that steps the matrices: two may take turns."""
        changed = (numbers["merged"] + numbers["reset"] > 0).any(-1).tolist()
        for index, matrix in enumerate(group.values()):
            if not changed[index]:
                continue
            # Where several merged together, a row is that of one of them.
            row = ... if len(group) == 1 else index
            before = {name: value[row] for name, value in report.before.items()}
            outcome = MergeOutcome(*(mask[row] for mask in report.outcome))
            with self._lock:
                known = list(self._attached.items())
            for optimizer, attached in known:
                if attached.saved is not None:
                    around = [found for each in attached.around if (found := each()) is not None]
                    follow_merge([*around, optimizer], matrix, before, outcome, self._paper)

    def _warn_of_resets(self, group: dict[str, PerturbedMatrix], reset: Tensor) -> None:
        names = [name for name, row in zip(group, reset, strict=True) if bool((row > 0).any())]
        if names:
            self._warn_once(
                "reset",
                f"the perturbation of {', '.join(names)} was not finite or made the matrix "
                "singular, and was reset. One reset is harmless; repeated resets mean that the "
                "learning rate is too high or that the loss is not finite",
            )

    def _warn_of_condition(self, group: dict[str, PerturbedMatrix], condition: Tensor) -> None:
        dtype = next(iter(group.values())).frozen.dtype
        worst = condition.amax(-1).tolist()
        eps = torch.finfo(dtype).eps
        beyond = [name for name, c in zip(group, worst, strict=True) if not c * eps < CONDITION_EPS]
        if beyond:
            self._warn_once(
                "condition",
                f"{', '.join(beyond)}: condition numbers up to {max(worst):.0e}, of which {dtype} "
                "keeps less than a digit in the inverse direction. Train in float64, with narrower "
                "bounds or with hook.penalty; p4flows.diagnose(module) shows each layer",
            )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, stacklevel=2)

    def _count(self, numbers: dict[str, Tensor]) -> None:
        counts = {name: int(number.sum()) for name, number in numbers.items() if name in _COUNTED}
        for name, count in counts.items():
            setattr(self.stats, name, getattr(self.stats, name) + count)
        attempted = numbers["merged"].numel()
        self.stats.skipped += attempted - counts["merged"] - counts["reset"]


def _groups(matrices: dict[str, PerturbedMatrix]) -> list[dict[str, PerturbedMatrix]]:
    """The matrices by name, those together that can be merged by the same calls."""
    groups: dict[Any, dict[str, PerturbedMatrix]] = defaultdict(dict)
    for name, matrix in matrices.items():
        alone = name if matrix.size > _STACK_UP_TO else ""
        groups[matrix._layout(), alone][name] = matrix
    return list(groups.values())


def _for_host(report: MergeReport, matrices: int) -> dict[str, Tensor]:
    """Masks and condition numbers on the CPU, float64, shape (matrices, members of each)."""
    fields = {**report.outcome._asdict(), "corrected": report.corrected, "rescued": report.rescued}
    rows = [*(mask.double() for mask in fields.values()), report.condition]
    host = torch.stack(rows).cpu().reshape(len(rows), matrices, -1)
    return dict(zip((*fields, "condition"), host, strict=True))


def _is_trained(matrix: PerturbedMatrix) -> bool:
    return any(parameter.requires_grad for parameter in matrix.parameters())


def _trained_parameters(matrices: dict[str, PerturbedMatrix]) -> list[nn.Parameter]:
    return [p for matrix in matrices.values() for p in matrix.parameters() if p.requires_grad]


def _check_held(matrices: dict[str, PerturbedMatrix], optimizer: Optimizer) -> None:
    """An error when the optimizer lacks parameters of matrices that are to be trained."""
    known = held(optimizer)
    missing = [
        f"{name}.{factor}"
        for name, matrix in matrices.items()
        for factor, parameter in matrix.named_parameters()
        if parameter.requires_grad and id(parameter) not in known
    ]
    if missing:
        raise ValueError(
            f"optimizer does not hold the parameters {', '.join(missing)}: build it from "
            "module.parameters(), or make a MergeHook for the layers of each optimizer"
        )
