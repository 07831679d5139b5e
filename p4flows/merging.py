"""MergeHook: decides when perturbed matrices merge, from inside the optimizer's step."""

import dataclasses
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from p4flows.arguments import check_positive_int
from p4flows.draws import Draw
from p4flows.matrices import MergeOutcome, PerturbedMatrix
from p4flows.matrices.error import CONDITION_EPS
from p4flows.matrices.merge import MergeReport, merge_together
from p4flows.optimizer_state import (
    carry_momentum,
    restart_lbfgs,
    restart_momentum,
    restart_parameter,
)

# A stack of small matrices merges in the time of one; copying large ones into a stack and back
# costs more than the calls it saves (measured: the break-even is between n = 128 and n = 256).
_STACK_UP_TO = 128

COUNTED = ("merged", "forced", "reset", "corrected", "rescued")

# Which hook drives a matrix: a second one would merge twice as often, which nothing else shows.
_drivers: "weakref.WeakKeyDictionary[PerturbedMatrix, weakref.ref[MergeHook]]" = (
    weakref.WeakKeyDictionary()
)


@dataclasses.dataclass
class MergeStats:
    """What a `MergeHook` has done so far, counted in matrices; readable by key as well.

    Attributes:
        merged: perturbations merged into their matrix, the forced ones included.
        skipped: merges refused because they were outside the bounds or not finite.
        forced: merges outside the bounds that N_force let through.
        reset: perturbations thrown away because they were not finite, or because N_force would have
            made the matrix singular to working precision.
        corrected: stored inverses computed anew, each N_correct merges and where a probe found one
            off.
        rescued: corrections of each N_correct merges that found no right digit left.

    Example:
        >>> dict(MergeStats(merged=3))["merged"]
        3
    """

    merged: int = 0
    skipped: int = 0
    forced: int = 0
    reset: int = 0
    corrected: int = 0
    rescued: int = 0

    def keys(self) -> Iterator[str]:
        """The names of the counts, so that `dict(stats)` works."""
        return (field.name for field in dataclasses.fields(self))

    def __getitem__(self, name: str) -> int:
        return int(getattr(self, name))


class MergeHook:
    """Merges every `PerturbedMatrix` of a module from inside `optimizer.step()` (Algorithm 1).

    Registered once on the optimizer, so that any training loop works unchanged.

    Args:
        module: holds the perturbed matrices, at any depth.
        optimizer: trains their u and v, any of `torch.optim`; other parameters are not touched.
        every: N, optimizer steps between merges.
        force_every: N_force, merges between forced ones; None is never.
        correct_every: N_correct, merges between corrections of the inverse; None is never.
        restart: what happens to the optimizer's state when v is redrawn. "carry": momentum that
            points along the old v is carried over to the new one, second moments stay. "v" (the
            paper): the state of v starts anew, u keeps its own. `LBFGS` keeps one history for all
            parameters together; it starts anew as a whole.
        draw: how v is redrawn: "basis", in turn from the columns of random orthogonal bases, or
            "normal", independently (the paper).

    Attributes:
        stats: a `MergeStats`.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when an interval is not positive, the module has no perturbed matrix that is to
            be trained, the optimizer does not hold its u and v, or another hook drives it already.

    Example:
        >>> from p4flows import P4InvTransform
        >>> layer = P4InvTransform(2)
        >>> optimizer = torch.optim.Adam(layer.parameters())
        >>> hook = MergeHook(layer, optimizer, every=10)
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
        optimizer: Optimizer,
        *,
        every: int = 50,
        force_every: int | None = 10,
        correct_every: int | None = 50,
        restart: Literal["carry", "v"] = "carry",
        draw: Draw = "basis",
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch Optimizer, got {type(optimizer).__name__}")
        check_positive_int("every", every)
        for name, interval in (("force_every", force_every), ("correct_every", correct_every)):
            if interval is not None:
                check_positive_int(name, interval)
        if restart not in ("carry", "v"):
            raise ValueError(f"restart must be 'carry' or 'v', got {restart!r}")
        if draw not in get_args(Draw):
            raise ValueError(f"draw must be 'normal' or 'basis', got {draw!r}")
        self.every = every
        self.force_every = force_every
        self.correct_every = correct_every
        self.restart = restart
        self.draw: Draw = draw
        self.stats = MergeStats()
        self._steps = 0
        self._merges = 0
        self._warned_of_condition = False
        self._matrices = _trainable_matrices(module, optimizer)
        # Weak, because the optimizer holds the hook: both shall go when the user lets go of them.
        self._optimizer = weakref.ref(optimizer)
        for name, matrix in self._matrices.items():
            driver = _drivers.get(matrix, lambda: None)()
            if driver is not None and driver.is_active():
                raise ValueError(f"{name} is driven by another MergeHook: call its remove() first")
        for matrix in self._matrices.values():
            _drivers[matrix] = weakref.ref(self)
        self._handle = optimizer.register_step_post_hook(self._after_step)

    @classmethod
    def paper(
        cls,
        module: nn.Module,
        optimizer: Optimizer,
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
        """Whether an optimizer still calls this hook."""
        optimizer = self._optimizer()
        return optimizer is not None and self._handle.id in optimizer._optimizer_step_post_hooks

    def remove(self) -> None:
        """Take the hook off the optimizer; the matrices keep their state."""
        self._handle.remove()
        for matrix in self._matrices.values():
            # A later hook may have taken the matrix over from this one.
            if _drivers.get(matrix, lambda: None)() is self:
                del _drivers[matrix]

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
        return {"steps": self._steps, "merges": self._merges, "stats": dict(self.stats)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count of steps and merges where `state_dict()` was taken."""
        self._steps = state_dict["steps"]
        self._merges = state_dict["merges"]
        self.stats = MergeStats(**state_dict["stats"])

    def __repr__(self) -> str:
        return (
            f"MergeHook({len(self._matrices)} matrices, every={self.every}, "
            f"force_every={self.force_every}, correct_every={self.correct_every}, "
            f"restart={self.restart!r}, draw={self.draw!r})"
        )

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        self._steps += 1
        if self._steps % self.every == 0:
            self._merge(optimizer)

    @torch.no_grad()
    def _merge(self, optimizer: Optimizer) -> None:
        self._merges += 1
        force = self.force_every is not None and self._merges % self.force_every == 0
        correct = self.correct_every is not None and self._merges % self.correct_every == 0
        for group in self._groups():
            matrices = list(group.values())
            report = merge_together(matrices, force, self.draw, correct)
            # All that the host has to know of the group, in one read.
            numbers = _for_host(report, len(matrices))
            self._count(numbers)
            self._restart_states(optimizer, matrices, report, numbers)
            self._watch_condition(group, numbers["condition"])

    def _restart_states(
        self,
        optimizer: Optimizer,
        matrices: list[PerturbedMatrix],
        report: MergeReport,
        numbers: dict[str, Tensor],
    ) -> None:
        reset = (numbers["reset"] > 0).any(-1)
        changed = (reset | (numbers["merged"] > 0).any(-1)).tolist()
        rows = [report.v, *report.outcome]
        each = zip(*(row.unbind() for row in rows), strict=True) if len(matrices) > 1 else [rows]
        for index, (matrix, (before, *masks)) in enumerate(zip(matrices, each, strict=True)):
            if changed[index]:
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
        for name, matrix in self._matrices.items():
            alone = name if matrix.size > _STACK_UP_TO else ""
            groups[matrix.layout(), alone][name] = matrix
        return list(groups.values())

    def _count(self, numbers: dict[str, Tensor]) -> None:
        counts = {name: int(number.sum()) for name, number in numbers.items() if name in COUNTED}
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


def _trainable_matrices(module: nn.Module, optimizer: Optimizer) -> dict[str, PerturbedMatrix]:
    """The perturbed matrices to be trained, by name; an error when the optimizer lacks one."""
    matrices = {
        name or type(found).__name__: found
        for name, found in module.named_modules()
        if isinstance(found, PerturbedMatrix)
        and any(parameter.requires_grad for parameter in found.parameters())
    }
    if not matrices:
        raise ValueError("module has no P4 layer to train: there is nothing to merge")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [
        f"{name}.{factor}"
        for name, matrix in matrices.items()
        for factor, parameter in matrix.named_parameters()
        if parameter.requires_grad and id(parameter) not in held
    ]
    if missing:
        raise ValueError(
            "optimizer does not hold the parameters "
            f"{', '.join(missing)}: build it from module.parameters()"
        )
    return matrices
