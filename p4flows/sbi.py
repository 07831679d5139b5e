"""P4 layers in the density estimators of sbi."""

from collections.abc import Callable
from typing import Any

from torch import nn

from p4flows.flows.conversion import swap_linear
from p4flows.merging.hook import MergeHook


def with_p4_layers(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A builder of sbi whose flows have P4Inv layers in place of linear layers, and a hook.

    Args:
        build: builds a flow with linear layers from batches, as `posterior_nn("nsf")` of
            `sbi.neural_nets` does.

    Returns:
        The builder for `NPE(density_estimator=...)`. The `MergeHook` of a flow is its attribute
        `hook`: it follows whichever optimizer sbi makes, and is pickled with the flow.

    Raises:
        ValueError: from the builder, when the flow has no linear layer, as "maf" has none.

    Example:
        >>> import torch
        >>> from nflows.transforms import LULinear
        >>> flow = with_p4_layers(lambda theta, x: LULinear(3))(None, None)
        >>> type(flow).__name__, flow.hook.is_active()
        ('P4InvTransform', True)
    """

    def build_with_p4_layers(*batches: Any) -> nn.Module:
        estimator = swap_linear(build(*batches))
        estimator.hook = MergeHook(estimator)  # type: ignore[assignment]
        return estimator

    return build_with_p4_layers
