"""Which optimizer steps which perturbed matrices, noticed by one global hook of torch's.

Whoever trains a flow inside another library never sees the optimizer: it is made there, replaced,
copied and loaded. So a driver (a `MergeHook`) is entered for matrices, not for an optimizer, and
finds out from the step itself who trains them.
"""

import warnings
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from p4flows.matrices.perturbed import PerturbedMatrix, living_matrices

# Steps without a merge after which a matrix counts as forgotten.
_FORGOTTEN_AFTER = 1000


class NotMergedWarning(UserWarning):
    """u and v of a P4 layer have been stepped for long and nothing merges them.

    A layer whose rank k is below n then stays within rank k of the matrix it started from. A
    forgotten `MergeHook` is one cause; a hook that is bound to an optimizer which has been
    replaced, copied or unpickled since is another, and so are layers that joined the optimizer
    later.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", NotMergedWarning)  # where this is meant
    """


class Driver(Protocol):
    """What merges matrices after the steps of an optimizer."""

    def follows(self, optimizer: Optimizer) -> bool:
        """Whether it merges after the steps of this optimizer."""

    def attach(self, optimizer: Optimizer) -> None:
        """Called before the first step of an optimizer that it follows."""

    def detach(self) -> None:
        """Called when some of its matrices were given to another driver."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after each step of an optimizer that it follows."""


# Held by the matrices, which a driver refers to weakly: it lives as long as they do.
_drivers: "weakref.WeakKeyDictionary[PerturbedMatrix, Driver]" = weakref.WeakKeyDictionary()
# Counts the changes of the above, after which every optimizer is looked at again.
_changes = 0


def driver_of(matrix: PerturbedMatrix) -> Driver | None:
    """Who merges a matrix.

    Args:
        matrix: any.

    Returns:
        The driver, or None.
    """
    return _drivers.get(matrix)


def is_stepped(matrix: PerturbedMatrix) -> bool:
    """Whether a matrix has a driver, or its u and v an optimizer that has stepped.

    Args:
        matrix: any.
    """
    if driver_of(matrix) is not None:
        return True
    own = {id(parameter) for parameter in matrix.parameters()}
    return any(not own.isdisjoint(held(optimizer)) for optimizer in _watches)


def drive(driver: Driver, matrices: Iterable[PerturbedMatrix]) -> None:
    """Make a driver the only one of some matrices.

    Args:
        driver: the new one; those before it are detached.
        matrices: which it merges from now on.
    """
    global _changes
    _changes += 1
    earlier: list[Driver] = []
    for matrix in matrices:
        before = _drivers.get(matrix)
        if before is not None and not any(before is each for each in (driver, *earlier)):
            earlier.append(before)
        _drivers[matrix] = driver
    for before in earlier:
        before.detach()


def release(driver: Driver) -> None:
    """Leave the matrices of a driver to no one.

    Args:
        driver: merges nothing from now on.
    """
    global _changes
    _changes += 1
    for matrix in [each for each, found in _drivers.items() if found is driver]:
        del _drivers[matrix]


def unwrapped(optimizer: object) -> object:
    """The optimizer behind the wrappers of Accelerate, Lightning and others.

    Args:
        optimizer: an optimizer, or a wrapper that has one as an attribute.

    Returns:
        The innermost one, or what came when there is none in it.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        >>> unwrapped(SimpleNamespace(optimizer=sgd)) is sgd
        True
    """
    while hasattr(inner := getattr(optimizer, "optimizer", None), "step"):
        optimizer = inner
    return optimizer


class _Watch:
    """What the steps of one optimizer have to do with perturbed matrices."""

    def __init__(self, optimizer: Optimizer, key: tuple[Any, ...], idle_steps: int) -> None:
        self.key = key
        self.drivers: list[Driver] = []
        self._idle: weakref.WeakSet[PerturbedMatrix] = weakref.WeakSet()
        self._seen: tuple[int, ...] = ()
        self.idle_steps = idle_steps
        if _steps_another(optimizer):
            return
        known = held(optimizer)
        for matrix in living_matrices():
            if not any(id(parameter) in known for parameter in matrix.parameters()):
                continue
            driver = driver_of(matrix)
            if driver is None or not driver.follows(optimizer):
                self._idle.add(matrix)
            elif not any(driver is each for each in self.drivers):
                self.drivers.append(driver)
        for driver in self.drivers:
            driver.attach(optimizer)
        self._seen = self._versions()

    def _versions(self) -> tuple[int, ...]:
        """Changes with every merge and reset, whoever calls it."""
        return tuple(sorted(matrix.draws._version for matrix in self._idle))

    def count(self, optimizer: Optimizer) -> None:
        """One step more in which nothing was to merge the idle matrices."""
        if not self._idle:
            return
        self.idle_steps += 1
        if self.idle_steps < _FORGOTTEN_AFTER:
            return
        versions = self._versions()
        stepped = [each for each in self._idle if any(p.requires_grad for p in each.parameters())]
        if stepped and versions == self._seen:
            warnings.warn(_message(optimizer, stepped), NotMergedWarning, stacklevel=4)
            self._idle.clear()
        self._seen, self.idle_steps = versions, 0


def _message(optimizer: Optimizer, matrices: list[PerturbedMatrix]) -> str:
    why = "they have no MergeHook"
    if any(driver_of(matrix) is not None for matrix in matrices):
        why = "their MergeHook is bound to another optimizer"
    low = [matrix.rank for matrix in matrices if matrix.rank < matrix.size]
    lost = "the perturbation is never renewed, and grows"
    if low:
        lost = f"they stay within rank {max(low)} of where they were"
    layers = "1 P4 layer" if len(matrices) == 1 else f"{len(matrices)} P4 layers"
    return (
        f"{type(optimizer).__name__} has stepped u and v of {layers} for {_FORGOTTEN_AFTER} steps "
        f"and nothing merges them ({why}): {lost}. "
        "MergeHook(module), without an optimizer, follows whichever one steps them"
    )


_watches: "weakref.WeakKeyDictionary[Optimizer, _Watch]" = weakref.WeakKeyDictionary()


def held(optimizer: Optimizer) -> set[int]:
    """The ids of an optimizer's parameters."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _steps_another(optimizer: Optimizer) -> bool:
    """Whether its parameters are those of an optimizer inside of it, whose steps count instead."""
    own = held(optimizer)
    inner = [each for each in vars(optimizer).values() if isinstance(each, Optimizer)]
    return any(own <= held(each) for each in inner if each is not optimizer)


def _after_any_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
    """Nothing but this comparison for an optimizer that trains no perturbed matrix."""
    groups = optimizer.param_groups
    key = (_changes, *((id(group["params"]), len(group["params"])) for group in groups))
    watch = _watches.get(optimizer)
    if watch is None or watch.key != key:
        watch = _Watch(optimizer, key, 0 if watch is None else watch.idle_steps)
        _watches[optimizer] = watch
    for driver in watch.drivers:
        driver.after_step(optimizer)
    watch.count(optimizer)


# Once and for good: a global hook cannot be removed while it runs, and this one costs nothing.
register_optimizer_step_post_hook(_after_any_step)
