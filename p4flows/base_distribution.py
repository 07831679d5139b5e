"""The standard normal base distribution of the builders, in the dtype of its flow."""

import torch
from nflows.distributions.normal import StandardNormal
from torch import Tensor


class BaseNormal(StandardNormal):
    """nflows' `StandardNormal`, whose samples follow `.to(dtype)` and `.to(device)`.

    nflows draws float32 noise whatever the flow is, which a float64 flow cannot take.

    Args:
        features: number of independent components.

    Example:
        >>> BaseNormal(2).double().sample(3).dtype
        torch.float64
    """

    _reference: Tensor

    def __init__(self, features: int) -> None:
        super().__init__([features])
        self.register_buffer("_reference", torch.empty(0), persistent=False)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        rows = () if context is None else (context.shape[0],)
        noise = torch.empty(*rows, num_samples, *self._shape).to(self._reference)
        return noise.normal_()
