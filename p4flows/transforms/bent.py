"""The elementwise Bent identity (Section 2.5) and its inverse, in forms that do not cancel."""

import math

import torch
from nflows.transforms.base import Transform
from torch import Tensor

from p4flows.arguments import check_floating

_SQRT_3_4 = math.sqrt(0.75)


class BentIdentity(Transform):
    """Elementwise Bent identity B(x) = x + (√(x² + 1) − 1)/2, a diffeomorphism of ℝ (Section 2.5).

    Its slope lies in (1/2, 3/2). The inverse is B⁻¹(y) = 4/3·(s − √(s² + 3/4)/2), s = y + 1/2.
    Both, and the logarithms of both slopes, are exact to a few units in the last place over the
    whole range of the dtype: written as above, they cancel at zero and x² overflows.

    Cost: O(nN) for N rows of n features, no parameters.

    Example:
        >>> bent = BentIdentity()
        >>> outputs, logabsdet = bent(torch.tensor([[0.0, -4 / 3]]))
        >>> torch.allclose(outputs, torch.tensor([[0.0, -1.0]])), logabsdet.shape
        (True, torch.Size([1]))
        >>> torch.allclose(bent.inverse(outputs)[0], torch.tensor([[0.0, -4 / 3]]))
        True
    """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """B(x) of every element.

        Args:
            inputs: x, shape `(N, ...)`.
            context: accepted and ignored.

        Returns:
            B(x) of the shape of x and Σ ln B'(x) of shape `(N,)`.

        Raises:
            TypeError: when the inputs are not a floating-point tensor.
            ValueError: when they have no batch dimension.
        """
        check_floating(inputs)
        # (√(x² + 1) − 1)/x without the difference and without the square, so that B = x·(1 + …/2).
        half = inputs / (1.0 + _hypot(inputs, 1.0))
        return torch.addcmul(inputs, inputs, half, value=0.5), _sum_of_log_slopes(inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """B⁻¹(y) of every element and −Σ ln B'(x); shapes and errors as for `forward`."""
        check_floating(inputs)
        # The sum s − hypot/2 has terms of one sign where s < 0. Elsewhere multiply it by
        # s + hypot/2, which turns the difference into y·(y + 1); halved, as the sum may overflow.
        upper = inputs.clamp(min=-0.5)
        shifted = upper + 0.5
        denominator = 0.5 * shifted + 0.25 * _hypot(shifted, _SQRT_3_4)
        right = upper * ((0.5 * upper + 0.5) / denominator)
        shifted = inputs.clamp(max=-0.5) + 0.5
        left = (4 / 3) * shifted - (2 / 3) * _hypot(shifted, _SQRT_3_4)
        outputs = torch.where(inputs < -0.5, left, right)
        return outputs, -_sum_of_log_slopes(outputs)


def _hypot(x: Tensor, y: float) -> Tensor:
    return torch.hypot(x, x.new_full((), y))


def _sum_of_log_slopes(x: Tensor) -> Tensor:
    """Σ ln B'(x) with B'(x) = 1 + x/(2·hypot(x, 1)), over all but the first dimension."""
    log_slopes = torch.log1p(0.5 * x / _hypot(x, 1.0))
    return log_slopes.reshape(len(x), -1).sum(-1) if x.numel() else x.new_zeros(len(x))
