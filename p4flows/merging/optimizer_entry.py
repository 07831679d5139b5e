"""State of a hook inside an optimizer's parameter group, where `state_dict()` takes it along.

torch keeps entries of a group that it does not know, through `state_dict()`, `load_state_dict()`,
copies and pickles, also in an optimizer that has never been stepped. So whatever saves an optimizer
saves the hook.
"""

from typing import Any

from torch import nn
from torch.optim import Optimizer

_NAME = "p4flows"


class OptimizerEntry:
    """One hook's state in one optimizer.

    It stands in the group of a parameter of the hook's, under the parameter's position there, which
    is what torch finds parameters by when it loads a checkpoint.

    Args:
        optimizer: holds the parameter.
        parameter: one that no other hook of this optimizer uses.
    """

    def __init__(self, optimizer: Optimizer, parameter: nn.Parameter) -> None:
        self.group, position = next(
            (index, position)
            for index, group in enumerate(optimizer.param_groups)
            for position, held in enumerate(group["params"])
            if held is parameter
        )
        self.key = str(position)
        self._written: dict[str, Any] | None = None

    def loaded(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """The state that is there when it is not the one that was written last, else None."""
        found: dict[str, Any] | None = self._entries(optimizer).get(self.key)
        return None if found is self._written else found

    def write(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Put a state there; it is not to be changed afterwards."""
        self._written = state
        # A new dict each time: what `state_dict()` has handed out does not change.
        entries = {**self._entries(optimizer), self.key: state}
        optimizer.param_groups[self.group][_NAME] = entries

    def erase(self, optimizer: Optimizer) -> None:
        """Leave nothing behind."""
        entries = {key: x for key, x in self._entries(optimizer).items() if key != self.key}
        optimizer.param_groups[self.group][_NAME] = entries
        if not entries:
            del optimizer.param_groups[self.group][_NAME]

    def _entries(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.param_groups[self.group].get(_NAME, {})
