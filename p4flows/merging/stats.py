"""What a `MergeHook` counts."""

import dataclasses
from collections.abc import Iterator


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
