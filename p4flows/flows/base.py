"""The base distributions of the builders, in the dtype of their flow."""

import math
from collections.abc import Sequence

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


class BaseNormalUniform(BaseNormal):
    """Standard normal in the Euclidean columns, uniform on [−π, π) in the circular ones.

    Args:
        features: number of columns.
        circular: those that are angles.

    Example:
        >>> base = BaseNormalUniform(3, circular=[1])
        >>> samples = base.sample(5)
        >>> samples.shape, bool((samples[:, 1].abs() <= 3.1416).all())
        (torch.Size([5, 3]), True)
    """

    circular: Tensor
    euclidean: Tensor

    def __init__(self, features: int, circular: Sequence[int]) -> None:
        super().__init__(features)
        angles = sorted(circular)
        lines = [column for column in range(features) if column not in set(angles)]
        self.register_buffer("circular", torch.tensor(angles, dtype=torch.int64), persistent=False)
        self.register_buffer("euclidean", torch.tensor(lines, dtype=torch.int64), persistent=False)

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        lines = inputs[:, self.euclidean]
        constant = 0.5 * len(self.euclidean) + len(self.circular)
        return -0.5 * lines.square().sum(-1) - constant * math.log(2.0 * math.pi)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        noise = super()._sample(num_samples, context)
        angles = torch.empty_like(noise[..., self.circular]).uniform_(-math.pi, math.pi)
        return noise.index_copy(-1, self.circular, angles)
