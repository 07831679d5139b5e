"""A merge as a function of the matrices' state: computed first, written last, all or nothing.

State is a dict of tensors by the names of parameters and buffers, with a leading dimension where
several matrices merge together. Nothing is written before all is known, and then everything by one
call, between whose writes no interrupt, signal handler or exception of Python can come.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from p4flows.matrices.directions import random_signs
from p4flows.matrices.linear_algebra import norm_1
from p4flows.matrices.precision import full_precision

if TYPE_CHECKING:
    from p4flows.matrices.perturbed import PerturbedMatrix

State = dict[str, Tensor]


def probe_tolerance(size: int) -> float:
    """The multiple of n·eps·‖A‖₁‖A⁻¹‖₁ beyond which a probed inverse is derived again.

    n signs add up the errors of a row by √n: that is a LAPACK ratio of one when the errors of all
    columns are alike. Where one column has them all the probe is the ratio itself, hence the 16:
    LAPACK's own tests pass below 30.
    """
    return min(math.sqrt(size), 16.0)


class MergeOutcome(NamedTuple):
    """What a merge did with each matrix: boolean tensors of the matrices' `batch_shape`.

    Attributes:
        merged: the perturbation went into the frozen matrix.
        forced: merged although the merge was outside its bounds.
        reset: the perturbation was thrown away without a merge, because it was not finite, or was
            to be forced and its merge would be singular to working precision.
    """

    merged: Tensor
    forced: Tensor
    reset: Tensor


class Merged(NamedTuple):
    """What a kind of matrix makes of a state; masks of the state's batch shape.

    Attributes:
        state: the new values of what changes.
        merged: as in `MergeOutcome`.
        forced: as in `MergeOutcome`.
        corrected: the probe found the updated inverse off, and it was derived again.
        rescued: corrected, and there had been not one right digit left.
        condition: ‖A‖₁·‖A⁻¹‖₁ afterwards, float64.
    """

    state: State
    merged: Tensor
    forced: Tensor
    corrected: Tensor
    rescued: Tensor
    condition: Tensor


class MergeReport(NamedTuple):
    """What a merge of several matrices did; a leading dimension is that of the matrices.

    Attributes:
        outcome: a `MergeOutcome`.
        corrected: matrices whose inverse was derived again.
        rescued: corrected ones that had not one right digit left.
        condition: as in `Merged`.
        before: u and v before the merge.
    """

    outcome: MergeOutcome
    corrected: Tensor
    rescued: Tensor
    condition: Tensor
    before: State


@torch.no_grad()
def merge_together(
    matrices: Sequence["PerturbedMatrix"], force: bool, correct: bool = False
) -> MergeReport:
    """Merge matrices of one layout by the same calls."""
    first = matrices[0]
    for matrix in matrices:
        matrix._refresh(thorough=False)
    with full_precision(first.frozen.device):
        after, report = _merged(first, read_state(matrices), force, correct)
    before = {name: value.clone() for name, value in report.before.items()}
    write_state(matrices, after)
    return report._replace(before=before)


def _merged(
    first: "PerturbedMatrix", state: State, force: bool, correct: bool
) -> tuple[State, MergeReport]:
    finite = (state["u"].isfinite() & state["v"].isfinite()).flatten(-2).all(-1)
    found = first._merged(state, finite, force)
    reset = ~found.merged if force else ~finite
    after = {**state, **found.state}
    corrected, rescued = found.corrected, found.rescued
    if correct:
        fresh, lost = first._corrected(after)
        after.update(fresh)
        corrected, rescued = torch.ones_like(corrected), rescued | lost
    if first._keeps_v and not bool(reset.any()):
        after["u"] = torch.where(found.merged[..., None, None], 0.0, state["u"])
        after["draws"] = state["draws"] + found.merged
    else:
        after.update(first._restarted(state, found.merged | reset))
    outcome = MergeOutcome(found.merged, found.forced, reset)
    before = {name: state[name] for name in ("u", "v")}
    report = MergeReport(outcome, corrected, rescued, found.condition, before)
    return changed(first._completed(after), state), report


def changed(after: State, before: State) -> State:
    """What of a state is not the very tensor it was before."""
    return {name: value for name, value in after.items() if value is not before.get(name)}


def read_state(matrices: Sequence["PerturbedMatrix"]) -> State:
    """The state of one matrix as it is, or of several stacked."""
    names = [*matrices[0]._parameters, *matrices[0]._buffers]
    if len(matrices) == 1:
        return {name: getattr(matrices[0], name).detach() for name in names}
    return {
        name: torch.stack([getattr(matrix, name).detach() for matrix in matrices]) for name in names
    }


@torch.no_grad()
def write_state(matrices: Sequence["PerturbedMatrix"], state: State) -> None:
    """Write into one matrix, or the rows of a stacked state into several, by one call."""
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for name, value in state.items():
        targets += [getattr(matrix, name) for matrix in matrices]
        values += [value] if len(matrices) == 1 else value.unbind()
    torch._foreach_copy_(targets, values)
    for matrix in matrices:
        matrix._look()


def probe(a: Tensor, x: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """How far X is from A⁻¹, estimated from one random vector of signs in O(n²).

    With such a vector s the expectation of ‖(I − A X)s‖₁ is at least ‖I − A X‖₁.
    """
    signs = random_signs(counter, a.shape[-1]).to(a.dtype).unsqueeze(-1)
    sides = [signs - a @ (x @ signs), signs - x @ (a @ signs)]
    right, left = (side.abs().sum((-2, -1)) for side in sides)
    # maximum, not max: NaN stays NaN.
    return torch.maximum(right, left).double(), norm_1(a) * norm_1(x)
