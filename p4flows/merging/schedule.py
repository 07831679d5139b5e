"""When to merge, to force and to correct; and what the merges did, counted."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from p4flows.arguments import check_positive_int


class Turn(NamedTuple):
    """What is due at a merge.

    Attributes:
        force: whether to merge also what is outside its bounds.
        correct: whether to correct the inverse.
    """

    force: bool
    correct: bool


class Schedule:
    """Counts steps and merges (Algorithm 1 and Section 2.4).

    Args:
        every: N, steps between merges.
        force_every: N_force, merges between forced ones; None is never.
        correct_every: N_correct, merges between corrections of the inverse; None is never.

    Attributes:
        steps: number of steps so far.
        merges: number of merges so far.

    Raises:
        TypeError: when an interval is not an int.
        ValueError: when it is not positive.

    Example:
        >>> schedule = Schedule(every=2, force_every=2)
        >>> [schedule.turn() for _ in range(4) if schedule.step()]
        [Turn(force=False, correct=False), Turn(force=True, correct=False)]
    """

    def __init__(
        self, every: int, force_every: int | None = None, correct_every: int | None = None
    ) -> None:
        check_positive_int("every", every)
        for name, interval in (("force_every", force_every), ("correct_every", correct_every)):
            if interval is not None:
                check_positive_int(name, interval)
        self.every, self.force_every, self.correct_every = every, force_every, correct_every
        self.steps = self.merges = 0

    def step(self) -> bool:
        """Count a step; whether a merge is due after it."""
        self.steps += 1
        return self.steps % self.every == 0

    def turn(self) -> Turn:
        """Count a merge; what is due at it."""
        self.merges += 1
        due = (
            interval is not None and self.merges % interval == 0
            for interval in (self.force_every, self.correct_every)
        )
        return Turn(*due)

    def state_dict(self) -> dict[str, Any]:
        """Both counts."""
        return {"steps": self.steps, "merges": self.merges}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from counts."""
        self.steps, self.merges = int(state["steps"]), int(state["merges"])


@dataclasses.dataclass
class MergeStats:
    """What a `MergeHook` has done so far, counted in matrices; readable by key as well.

    Attributes:
        merged: perturbations merged into their matrix, the forced ones included.
        skipped: merges refused because they were outside the bounds or not finite.
        forced: merges outside the bounds that N_force let through.
        reset: perturbations thrown away because they were not finite, or because N_force would have
            made the matrix singular to working precision.
        corrected: stored inverses derived again, each N_correct merges and where a probe found one
            off.
        rescued: corrected inverses that had no right digit left.

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
