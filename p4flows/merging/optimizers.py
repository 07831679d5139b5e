"""Optimizers: what they hold, hearing of their steps, and a place in their state."""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

_NAME = "p4flows"

Listener = Callable[[Optimizer], None]


def held(optimizer: Optimizer) -> set[int]:
    """The ids of an optimizer's parameters."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def layout_of(optimizer: Optimizer) -> tuple[Any, ...]:
    """What changes when an optimizer is given other parameters."""
    return tuple((id(group["params"]), len(group["params"])) for group in optimizer.param_groups)


def chain_of(optimizer: object) -> list[object]:
    """An optimizer and those that it wraps: the wrappers of Accelerate, Lookahead and others."""
    chain = [optimizer]
    while hasattr(inner := getattr(chain[-1], "optimizer", None), "step"):
        chain.append(inner)
    return chain


def inner_of(optimizer: Optimizer) -> Optimizer | None:
    """The optimizer inside of another one that steps the same parameters, or None."""
    own = held(optimizer)
    inner = (each for each in vars(optimizer).values() if isinstance(each, Optimizer))
    return next((each for each in inner if each is not optimizer and own <= held(each)), None)


def is_at_rest(optimizer: Optimizer) -> bool:
    """Whether all learning rates are zero; rates on another device are taken not to be."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
        return False
    return all(rate is not None and rate == 0 for rate in rates)


class SavedState:
    """A state of our own inside `optimizer.state_dict()`, so that a checkpoint has it.

    torch keeps entries of a parameter group that it does not know. The entry is written when the
    state is asked for, and taken out when a state has been loaded.

    Args:
        optimizer: holds the parameter.
        parameter: one that no other `SavedState` of the optimizer uses; torch finds parameters by
            their position when it loads a state.
        save: returns the state.
        load: takes a state that was loaded.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameter: nn.Parameter,
        save: Callable[[], dict[str, Any]],
        load: Callable[[dict[str, Any]], None],
    ) -> None:
        self._parameter, self._save, self._load = parameter, save, load
        self._handles = [
            optimizer.register_state_dict_post_hook(self._write),
            optimizer.register_load_state_dict_post_hook(self._take),
        ]
        self._take(optimizer)  # what was loaded before

    def remove(self) -> None:
        """Leave the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _place(self, optimizer: Optimizer) -> tuple[int, str] | None:
        for index, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                if parameter is self._parameter:
                    return index, str(position)
        return None

    def _write(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        place = self._place(optimizer)
        if place is not None:
            group = state_dict["param_groups"][place[0]]
            group[_NAME] = {**group.get(_NAME, {}), place[1]: self._save()}

    def _take(self, optimizer: Optimizer) -> None:
        place = self._place(optimizer)
        group = {} if place is None else optimizer.param_groups[place[0]]
        if place is None or place[1] not in group.get(_NAME, {}):
            return
        entries = dict(group.pop(_NAME))
        found = entries.pop(place[1])
        if entries:
            group[_NAME] = entries
        self._load(found)


class _Announcer:
    """Tells listeners of every step of every optimizer, through one global hook of torch's.

    The hook is there while there are listeners. torch's hooks cannot be changed while they run:
    then it is taken away later.
    """

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._handle: RemovableHandle | None = None
        self._running = 0
        self._lock = threading.RLock()

    def add(self, listener: Listener) -> None:
        with self._lock:
            self._listeners = [*self._listeners, listener]
            self._tidy()

    def remove(self, listener: Listener) -> None:
        with self._lock:
            self._listeners = [each for each in self._listeners if each != listener]
            self._tidy()

    def _tidy(self) -> None:
        if self._listeners and self._handle is None:
            self._handle = register_optimizer_step_post_hook(self._announce)
        elif not self._listeners and self._handle is not None and not self._running:
            self._handle.remove()
            self._handle = None

    def _announce(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with self._lock:
            self._running += 1
        try:
            for listener in self._listeners:
                listener(optimizer)
        finally:
            with self._lock:
                self._running -= 1


_announcer = _Announcer()
listen, stop_listening = _announcer.add, _announcer.remove
