"""MergeHook: decides when perturbed matrices merge, from inside the optimizer's step."""

import dataclasses
import warnings
import weakref
from collections import defaultdict
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from p4flows.arguments import check_module, check_positive_int
from p4flows.matrices import MergeOutcome, PerturbedMatrix
from p4flows.matrices.directions import Draw
from p4flows.matrices.error import CONDITION_EPS
from p4flows.matrices.merge import MergeReport, merge_together
from p4flows.merging.attaching import drive, driver_of, held, release, unwrapped
from p4flows.merging.average import AverageWatch
from p4flows.merging.optimizer_entry import OptimizerEntry
from p4flows.merging.optimizer_state import (
    carry_momentum,
    restart_lbfgs,
    restart_momentum,
    restart_parameter,
)
from p4flows.merging.processes import Comparison, group_of, refuse_join, refuse_what_cannot_merge
from p4flows.merging.stats import MergeStats

# A stack of small matrices merges in the time of one; copying large ones into a stack and back
# costs more than the calls it saves (measured: the break-even is between n = 128 and n = 256).
_STACK_UP_TO = 128

_COUNTED = ("merged", "forced", "reset", "corrected", "rescued")


class MergeHook:
    """Merges every `PerturbedMatrix` of a module from inside `optimizer.step()` (Algorithm 1).

    Any training loop works unchanged, also one inside another library: without an optimizer the
    hook attaches itself to whichever one steps the module's u and v, and to its successor with the
    counts that it has. The counts travel in `optimizer.state_dict()`, in the entry "p4flows" of a
    parameter group, so that a checkpoint of module and optimizer resumes exactly.

    A newer hook takes its matrices over from an older one. A hook lives as long as its matrices,
    held or not. It can be pickled; a copy made together with the module drives the copied module.

    Args:
        module: holds the perturbed matrices, at any depth.
        optimizer: trains their u and v, any of `torch.optim`, also inside a wrapper (`.optimizer`);
            other parameters are not touched. The hook is bound to it. None: whichever optimizer
            steps u and v, which has to hold all of them that are to be trained.
        every: N, optimizer steps between merges; steps that a `GradScaler` skipped do not count.
        force_every: N_force, merges between forced ones; None is never.
        correct_every: N_correct, merges between corrections of the inverse; None is never.
        restart: what happens to the optimizer's state when v is redrawn. "carry": momentum that
            points along the old v is carried over to the new one, second moments stay. "v" (the
            paper): the state of v starts anew, u keeps its own. `LBFGS` keeps one history for all
            parameters together; it starts anew as a whole.
        draw: how the matrices draw v from now on: "basis", in turn from the columns of random
            orthogonal bases, or "normal", independently (the paper); see
            `PerturbedMatrix.draw_as`.
        process_group: processes that train the same module; they are compared at each merge, by one
            reduction of a few numbers. By default that of a `DistributedDataParallel` in the
            module, or none.

    Attributes:
        stats: a `MergeStats`.

    Raises:
        TypeError: when an argument has the wrong type, u and v are sharded (FSDP2), or the
            optimizer is a `ZeroRedundancyOptimizer`.
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

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        every: int = 50,
        force_every: int | None = 10,
        correct_every: int | None = 50,
        restart: Literal["carry", "v"] = "carry",
        draw: Draw = "basis",
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        check_module(module)
        inner = unwrapped(optimizer)
        if inner is not None and not isinstance(inner, Optimizer):
            raise TypeError(f"optimizer must be a torch Optimizer, got {type(optimizer).__name__}")
        check_positive_int("every", every)
        for name, interval in (("force_every", force_every), ("correct_every", correct_every)):
            if interval is not None:
                check_positive_int(name, interval)
        if restart not in ("carry", "v"):
            raise ValueError(f"restart must be 'carry' or 'v', got {restart!r}")
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
            matrix.draw_as(draw)
        self.every = every
        self.force_every = force_every
        self.correct_every = correct_every
        self.restart = restart
        self.draw = draw
        self.stats = MergeStats()
        self._steps = 0
        self._merges = 0
        self._warned_of_condition = False
        self._skipped: Tensor | None = None
        self._start(matrices, inner)
        self._among(module, process_group)
        drive(self, matrices.values())
        if inner is not None:
            self.attach(inner)

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
        """A hook with the paper's settings: independent draws of v, whose state starts anew.

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
            restart="v",
            draw="normal",
        )

    def is_active(self) -> bool:
        """Whether the next step of an optimizer that holds u and v is counted by this hook.

        Not so when it was removed, a newer hook took its matrices over, the optimizer that it is
        bound to is gone, or its matrices are: those of a copy are, when it was copied without the
        module.
        """
        if self._bound is not None and self._bound() is None:
            return False
        return any(driver_of(matrix) is self for matrix in self._alive().values())

    def compare(self, process_group: "dist.ProcessGroup | None") -> None:
        """Compare processes that train the same module, from now on, or no more.

        Args:
            process_group: they, all of which have to call it; None for no comparison.
        """
        self.process_group = process_group
        self._comparison = None if process_group is None else Comparison(process_group)

    def remove(self) -> None:
        """Take the hook off its matrices and optimizers; the matrices keep their state."""
        release(self)
        self.detach()

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
        if not self._driven():
            raise RuntimeError(
                "this hook drives no matrix: it was removed, a newer MergeHook took over, or the "
                "module is gone"
            )
        merged = self._merge(force, correct=False)
        self._write()
        return merged

    def penalty(self, strength: float) -> Tensor:
        """The penalty C_p·g(u, v) of Appendix A, summed over all matrices.

        Args:
            strength: C_p, 0.1 in the paper's Table 1.

        Returns:
            A differentiable scalar to add to the loss.
        """
        penalties = [matrix.penalty().sum() for matrix in self._matrices.values()]
        return strength * torch.stack(penalties).sum()

    def state_dict(self) -> dict[str, Any]:
        """Counters and statistics; the matrices keep the rest in the module's `state_dict`."""
        state = {"steps": self._steps, "merges": self._merges, "stats": dict(self.stats)}
        return state if self._skipped is None else {**state, "skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count of steps and merges where `state_dict()` was taken.

        Not needed where the optimizer's own state is loaded, which has it; this one wins.
        """
        self._take_over(state_dict)
        # An optimizer that is not there yet may have a state of its own to offer.
        self._is_loaded = not self._entries
        self._write()

    def _take_over(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        self._merges = state["merges"]
        self._skipped = state.get("skipped")
        self.stats = MergeStats(**state["stats"])

    def __repr__(self) -> str:
        return (
            f"MergeHook({len(self._matrices)} matrices, every={self.every}, "
            f"force_every={self.force_every}, correct_every={self.correct_every}, "
            f"restart={self.restart!r}, draw={self.draw!r})"
        )

    def _start(self, matrices: dict[str, PerturbedMatrix], optimizer: Optimizer | None) -> None:
        """What a copy does not share."""
        # Weak, because the matrices hold the hook: both shall go when the user lets go of them.
        self._references = {name: weakref.ref(matrix) for name, matrix in matrices.items()}
        self._bound = None if optimizer is None else weakref.ref(optimizer)
        # Of each optimizer that has stepped the matrices.
        self._entries: weakref.WeakKeyDictionary[Optimizer, OptimizerEntry] = (
            weakref.WeakKeyDictionary()
        )
        self._is_loaded = False
        self._averages = AverageWatch()
        self.compare(None)
        self._wrapped: weakref.ref[nn.Module] | None = None

    def _among(self, module: nn.Module, group: "dist.ProcessGroup | None") -> None:
        self.compare(group_of(module) if group is None else group)
        self._wrapped = weakref.ref(module)

    def __getstate__(self) -> dict[str, Any]:
        # A process group cannot be pickled, and is not that of another run.
        own = (
            "_references",
            "_bound",
            "_entries",
            "_is_loaded",
            "_averages",
            "process_group",
            "_comparison",
            "_wrapped",
        )
        state = {name: value for name, value in vars(self).items() if name not in own}
        matrices = self._alive()
        driven = [name for name, matrix in matrices.items() if driver_of(matrix) is self]
        return {**state, "stats": dataclasses.replace(self.stats), "state": (matrices, driven)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        matrices, driven = state.pop("state")
        vars(self).update(state)
        self._start(matrices, None)
        found = [matrices[name] for name in driven]
        drive(self, [matrix for matrix in found if driver_of(matrix) is None])

    def _alive(self) -> dict[str, PerturbedMatrix]:
        found = ((name, reference()) for name, reference in self._references.items())
        return {name: matrix for name, matrix in found if matrix is not None}

    @property
    def _matrices(self) -> dict[str, PerturbedMatrix]:
        """Those that are to be trained, by name."""
        return {name: matrix for name, matrix in self._alive().items() if _is_trained(matrix)}

    def _driven(self) -> dict[str, PerturbedMatrix]:
        """Those of them that no newer hook has taken over."""
        return {name: m for name, m in self._matrices.items() if driver_of(m) is self}

    def _write(self) -> None:
        for optimizer, entry in self._entries.items():
            entry.write(optimizer, self.state_dict())

    def follows(self, optimizer: Optimizer) -> bool:
        """Whether it merges after the steps of this optimizer."""
        return self._bound is None or self._bound() is optimizer

    def attach(self, optimizer: Optimizer) -> None:
        """Called before the first step of an optimizer that it follows."""
        matrices = self._driven()
        refuse_what_cannot_merge(matrices, optimizer)
        _check_held(matrices, optimizer)
        trained = (
            p for matrix in matrices.values() for p in matrix.parameters() if p.requires_grad
        )
        entry = OptimizerEntry(optimizer, next(trained))
        known = self._entries.get(optimizer)
        if known is not None and (known.group, known.key) == (entry.group, entry.key):
            return
        if known is not None:
            known.erase(optimizer)
        self._entries[optimizer] = entry
        loaded = entry.loaded(optimizer)
        if loaded is not None and not self._is_loaded:
            self._take_over(loaded)
        self._is_loaded = False
        entry.write(optimizer, self.state_dict())

    def detach(self) -> None:
        """Called when some of its matrices were given to another hook."""
        for optimizer, entry in self._entries.items():
            entry.erase(optimizer)
        self._entries.clear()

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after each step of an optimizer that it follows."""
        entry = self._entries[optimizer]
        loaded = entry.loaded(optimizer)
        if loaded is not None:
            self._take_over(loaded)
        self._steps += 1
        if (found_inf := getattr(optimizer, "found_inf", None)) is not None:
            # A fused optimizer skips inside of its kernel; reading that at each step would wait
            # for the device each time.
            skipped = (found_inf != 0).to(torch.int64)
            self._skipped = skipped if self._skipped is None else self._skipped + skipped
        if self._steps % self.every == 0 and not self._discount_skipped():
            self._merges += 1
            force = self.force_every is not None and self._merges % self.force_every == 0
            correct = self.correct_every is not None and self._merges % self.correct_every == 0
            if self._comparison is not None:
                refuse_join(None if self._wrapped is None else self._wrapped())
                self._comparison.start(self._driven(), self._steps)
            self._averages.look(self._driven().values(), self.every)
            self._merge(force, correct)
        entry.write(optimizer, self.state_dict())

    def _discount_skipped(self) -> int:
        """Take back the steps that a GradScaler skipped; their number."""
        if self._skipped is None:
            return 0
        skipped, self._skipped = int(self._skipped), None
        self._steps -= skipped
        return skipped

    @torch.no_grad()
    def _merge(self, force: bool, correct: bool) -> bool:
        complete = True
        for group in self._groups():
            matrices = list(group.values())
            report = merge_together(matrices, force, correct)
            # All that the host has to know of the group, in one read.
            numbers = _for_host(report, len(matrices))
            self._count(numbers)
            complete = complete and bool((numbers["merged"] > 0).all())
            self._restart_states(matrices, report, numbers)
            self._watch_condition(group, numbers["condition"])
        return complete

    def _restart_states(
        self, matrices: list[PerturbedMatrix], report: MergeReport, numbers: dict[str, Tensor]
    ) -> None:
        reset = (numbers["reset"] > 0).any(-1)
        changed = (reset | (numbers["merged"] > 0).any(-1)).tolist()
        rows = [report.v, *report.outcome]
        each = zip(*(row.unbind() for row in rows), strict=True) if len(matrices) > 1 else [rows]
        for index, (matrix, (before, *masks)) in enumerate(zip(matrices, each, strict=True)):
            if not changed[index]:
                continue
            # Two optimizers may take turns, and one that was replaced may come back.
            for optimizer in self._entries:
                outcome = MergeOutcome(*masks)
                self._restart_state(optimizer, matrix, before, outcome, bool(reset[index]))

    def _watch_condition(self, group: dict[str, PerturbedMatrix], condition: Tensor) -> None:
        """Tell the user once when the dtype cannot carry a matrix any more."""
        dtype = next(iter(group.values())).frozen.dtype
        eps = torch.finfo(dtype).eps
        worst = condition.amax(-1).tolist()
        beyond = [name for name, c in zip(group, worst, strict=True) if not c * eps < CONDITION_EPS]
        if beyond and not self._warned_of_condition:
            self._warned_of_condition = True
            warnings.warn(
                f"{', '.join(beyond)}: condition numbers up to {max(worst):.0e}, of which {dtype} "
                "keeps less than a digit in the inverse direction. Train in float64, with narrower "
                "bounds or with hook.penalty; p4flows.diagnose(module) shows each layer",
                stacklevel=2,
            )

    def _groups(self) -> list[dict[str, PerturbedMatrix]]:
        """The matrices by name, those together that can be merged by the same calls."""
        groups: dict[Any, dict[str, PerturbedMatrix]] = defaultdict(dict)
        for name, matrix in self._driven().items():
            alone = name if matrix.size > _STACK_UP_TO else ""
            groups[matrix.layout(), alone][name] = matrix
        return list(groups.values())

    def _count(self, numbers: dict[str, Tensor]) -> None:
        counts = {name: int(number.sum()) for name, number in numbers.items() if name in _COUNTED}
        for name, count in counts.items():
            setattr(self.stats, name, getattr(self.stats, name) + count)
        attempted = numbers["merged"].numel()
        self.stats.skipped += attempted - counts["merged"] - counts["reset"]

    def _restart_state(
        self,
        optimizer: Optimizer,
        matrix: PerturbedMatrix,
        before: Tensor,
        outcome: MergeOutcome,
        any_reset: bool,
    ) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            restart_lbfgs(optimizer)
            return
        if self.restart == "carry":
            carry_momentum(optimizer, matrix.u, before, matrix.v, outcome.merged)
            restart_momentum(optimizer, matrix.v, outcome.merged)
        else:
            restart_parameter(optimizer, matrix.v, outcome.merged | outcome.reset)
        if any_reset:
            # The state of what was not finite is not finite either: it restarts in any case.
            for factor in (matrix.u, matrix.v):
                restart_parameter(optimizer, factor, outcome.reset)


def _for_host(report: MergeReport, matrices: int) -> dict[str, Tensor]:
    """Masks and condition numbers on the CPU, float64, shape (matrices, members of each)."""
    fields = {**report.outcome._asdict(), "corrected": report.corrected, "rescued": report.rescued}
    rows = [*(mask.double() for mask in fields.values()), report.condition]
    host = torch.stack(rows).cpu().reshape(len(rows), matrices, -1)
    return dict(zip((*fields, "condition"), host, strict=True))


def _is_trained(matrix: PerturbedMatrix) -> bool:
    return any(parameter.requires_grad for parameter in matrix.parameters())


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
