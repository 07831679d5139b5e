"""Starting the optimizer state of re-initialised parameters anew, in place.

In place, because fused, capturable and compiled optimizers keep hold of the very tensors; and entry
by entry, because one parameter may hold a batch of matrices of which only some were merged.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from p4flows.matrices.linear_algebra import inverse_small

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


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


@torch.no_grad()
def restart_parameter(optimizer: Optimizer, parameter: nn.Parameter, where: Tensor) -> None:
    """Give the state of a re-initialised parameter the values of a fresh optimizer.

    The one exception is SGD with dampening, where a fresh optimizer does not damp its first step.

    Args:
        optimizer: any of `torch.optim` with a state for each parameter; an unknown entry of
            another optimizer is set to zero.
        parameter: shape `(*batch, n, k)`.
        where: boolean tensor of shape `batch`: which matrices were re-initialised. Entries with a
            batch dimension restart there; those that all matrices share (the step count) restart
            when every matrix did.
    """
    if not bool(where.any()):
        return
    everywhere = bool(where.all())
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
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
def restart_momentum(optimizer: Optimizer, parameter: nn.Parameter, where: Tensor) -> None:
    """Set averages of gradients to zero and keep the rest; arguments as for `restart_parameter`."""
    for momentum in _momenta(optimizer, parameter):
        momentum.masked_fill_(where[..., None, None], 0.0)


@torch.no_grad()
def carry_momentum(
    optimizer: Optimizer, u: nn.Parameter, before: Tensor, after: Tensor, where: Tensor
) -> None:
    """Turn averages of ∂J/∂u for an old v into averages for a new one.

    With ∂J/∂u = (∂J/∂Ã) v, an average m for the old v says m (vᵀv)⁻¹vᵀ of ∂J/∂Ã, in the sense of
    least squares, and that says m (vᵀv)⁻¹vᵀv' of the gradient for the new v'.

    Args:
        optimizer: as for `restart_parameter`.
        u: shape `(*batch, n, k)`.
        before: the old v, same shape.
        after: the new v', same shape.
        where: boolean tensor of shape `batch`: for which matrices.
    """
    momenta = _momenta(optimizer, u)
    # At full rank the directions stay, and the averages are those of the new ones to the last bit.
    if momenta and not torch.equal(before, after):
        transport = inverse_small(before.mT @ before) @ (before.mT @ after)
        # Columns of v that are not independent determine nothing.
        transport = torch.nan_to_num(transport, 0.0, 0.0, 0.0)
        for momentum in momenta:
            momentum.copy_(torch.where(where[..., None, None], momentum @ transport, momentum))


def _momenta(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    state = optimizer.state.get(parameter, {})
    return [state[name] for name in _MOMENTA if isinstance(state.get(name), Tensor)]


def restart_lbfgs(optimizer: LBFGS) -> None:
    """Drop the history of LBFGS: its curvature pairs mix all parameters and fit none any more."""
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    evaluations = state.get("func_evals", 0)
    state.clear()
    state["func_evals"] = evaluations
    state["n_iter"] = 0
