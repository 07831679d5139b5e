"""The optimizer's state at a merge: u starts at zero again, and v is another one.

In place, because fused, capturable and compiled optimizers keep hold of the very tensors; and entry
by entry, because one parameter may hold a batch of matrices of which only some were merged.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from p4flows.matrices import MergeOutcome, PerturbedMatrix
from p4flows.matrices.linear_algebra import inverse_small, plus_identity

# What torch.optim starts an entry with where that is not zero, from the parameter's group.
_INITIAL: dict[str, Callable[[dict[str, Any]], float]] = {
    "mu_product": lambda group: 1.0,  # NAdam
    "mu": lambda group: 1.0,  # ASGD
    "eta": lambda group: float(group["lr"]),  # ASGD
    "step_size": lambda group: float(group["lr"]),  # Rprop
    "sum": lambda group: float(group["initial_accumulator_value"]),  # Adagrad
}

# What torch.optim keeps as an average of gradients: linear in them, and zero at first.
_MOMENTA = ("exp_avg", "momentum_buffer")

# What optimizers keep as a copy of the weights themselves: schedule-free methods, Lookahead.
_COPIES = ("z", "slow_params", "slow_param", "slow_weights", "slow_buffer", "backup_params")


def follow_merge(
    optimizers: list[object],
    matrix: PerturbedMatrix,
    before: dict[str, Tensor],
    outcome: MergeOutcome,
    paper: bool,
) -> None:
    """Make the state of u and v fit a matrix that has just been merged or reset.

    Averages of gradients of u are carried over to the new v, those of v start at zero, and second
    moments stay. In the paper the state of v starts again, and u keeps its own. Copies of u move
    with it.
    """
    u, v = matrix.u, matrix.v
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            restart_lbfgs(optimizer)
            continue
        _move_copies(optimizer, matrix, before, outcome)
        if not isinstance(optimizer, Optimizer):
            continue
        if paper:
            restart_parameter(optimizer, v, outcome.merged | outcome.reset)
        else:
            carry_momentum(optimizer, u, before["v"], v, outcome.merged)
            for name, momentum in _entries(optimizer, v):
                if name in _MOMENTA:
                    momentum.masked_fill_(outcome.merged[..., None, None], 0.0)
        # The state of what was not finite is not finite either.
        for factor in (u, v):
            restart_parameter(optimizer, factor, outcome.reset)


@torch.no_grad()
def restart_parameter(optimizer: Optimizer, parameter: nn.Parameter, where: Tensor) -> None:
    """Give the state of a re-initialised parameter the values of a fresh optimizer.

    The one exception is SGD with dampening, where a fresh optimizer does not damp its first step.
    """
    if not bool(where.any()):
        return
    everywhere = bool(where.all())
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        if name in _COPIES:
            continue
        initial = 0.0
        if name in _INITIAL:
            initial = _INITIAL[name](_group_of(optimizer, parameter))
        if isinstance(value, Tensor) and value.dim() > 0 and value.dim() == parameter.dim():
            value.masked_fill_(where[..., None, None], initial)
        elif isinstance(value, Tensor) and everywhere:
            value.fill_(initial)
        elif isinstance(value, int | float) and everywhere:
            state[name] = type(value)(initial)


@torch.no_grad()
def carry_momentum(
    optimizer: Optimizer, u: nn.Parameter, before: Tensor, after: Tensor, where: Tensor
) -> None:
    """Turn averages of ∂J/∂u for an old v into averages for a new one.

    With ∂J/∂u = (∂J/∂Ã) v, an average m for the old v says m (vᵀv)⁻¹vᵀ of ∂J/∂Ã, in the sense of
    least squares, and that says m (vᵀv)⁻¹vᵀv' of the gradient for the new v'.
    """
    momenta = [state for name, state in _entries(optimizer, u) if name in _MOMENTA]
    # At full rank the directions stay, and the averages are those of the new ones to the last bit.
    if momenta and not torch.equal(before, after):
        transport = inverse_small(before.mT @ before) @ (before.mT @ after)
        # Columns of v that are not independent determine nothing.
        transport = torch.nan_to_num(transport, 0.0, 0.0, 0.0)
        for momentum in momenta:
            momentum.copy_(torch.where(where[..., None, None], momentum @ transport, momentum))


@torch.no_grad()
def _move_copies(
    optimizer: object, matrix: PerturbedMatrix, before: dict[str, Tensor], outcome: MergeOutcome
) -> None:
    """Copies c of u stand for A + c R, and have to afterwards.

    Where v stays, R becomes G R with G = I + vᵀu, and c becomes (c − u) G⁻¹.
    """
    copies = [(name, copy) for name, copy in _entries(optimizer, matrix.u) if name in _COPIES]
    if not copies:
        return
    u, v = before["u"], before["v"]
    if matrix._trains_v or not torch.equal(v, matrix.v.detach()):
        raise TypeError(
            f"{type(optimizer).__name__} keeps a copy of the weights ({copies[0][0]!r}), which a "
            f"merge can carry over only where v stays: build P4 layers with rank=features (here "
            f"{matrix.size}) and perturbation='relative', or use another optimizer"
        )
    shrink = inverse_small(plus_identity(v.mT @ u))
    for _, copy in copies:
        moved = torch.where(outcome.merged[..., None, None], (copy - u) @ shrink, copy)
        copy.copy_(torch.where(outcome.reset[..., None, None], 0.0, moved))


def _entries(optimizer: object, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the state of a parameter."""
    states = getattr(optimizer, "state", {})
    state = states.get(parameter, {}) if hasattr(states, "get") else {}
    return ((name, value) for name, value in state.items() if isinstance(value, Tensor))


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def restart_lbfgs(optimizer: LBFGS) -> None:
    """Drop the history of LBFGS: its curvature pairs mix all parameters and fit none any more."""
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    evaluations = state.get("func_evals", 0)
    state.clear()
    state["func_evals"] = evaluations
    state["n_iter"] = 0
