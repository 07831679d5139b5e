"""Monotone rational-quadratic splines of the unit interval (Durkan et al. 2019)."""

import torch
from torch import Tensor
from torch.nn import functional

# Of the interval's length, and of the slope: as in Durkan et al.
_MIN_SIZE = 1e-3
_MIN_SLOPE = 1e-3


def knots(sizes: Tensor, dim: int = -1) -> Tensor:
    """Ends of bins between 0 and 1 from unnormalised sizes.

    Args:
        sizes: K of them along a dimension.
        dim: that dimension.

    Returns:
        The same shape, but K + 1 along the dimension, ascending from 0 to 1.

    Example:
        >>> knots(torch.zeros(4)).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    bins = sizes.shape[dim]
    shares = _MIN_SIZE + (1.0 - bins * _MIN_SIZE) * functional.softmax(sizes, dim)
    inner = torch.cumsum(shares.narrow(dim, 0, bins - 1), dim)
    # The ends exactly: what is left beside them by rounding would belong to no bin.
    end = inner.narrow(dim, 0, 1)
    return torch.cat([torch.zeros_like(end), inner, torch.ones_like(end)], dim)


def slopes(unbounded: Tensor) -> Tensor:
    """Positive derivatives at the knots, 1 for an argument of 0.

    Args:
        unbounded: any shape.

    Returns:
        The same shape.

    Example:
        >>> slopes(torch.zeros(2)).tolist()
        [1.0, 1.0]
    """
    one = torch.log(torch.expm1(unbounded.new_full((), 1.0 - _MIN_SLOPE)))
    return _MIN_SLOPE + functional.softplus(unbounded + one)


def rational_quadratic(
    inputs: Tensor, sizes: Tensor, unbounded: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """A monotone spline, a bijection of [0, 1].

    Args:
        inputs: in [0, 1], shape `(...)`; what is outside is taken as 0 or 1.
        sizes: widths and heights of the bins before `knots`, shape `(..., 2, bins)`.
        unbounded: derivatives at the knots before `slopes`, shape `(..., bins + 1)`.
        inverse: whether to solve for x instead; exact, by the quadratic formula.

    Returns:
        Outputs in [0, 1] and the log of the derivative, both of shape `(...)`.

    Example:
        >>> sizes = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> unbounded = torch.tensor([0.0, 2.0, -1.0])
        >>> outputs, logabsdet = rational_quadratic(torch.tensor(0.3), sizes, unbounded)
        >>> back, _ = rational_quadratic(outputs, sizes, unbounded, inverse=True)
        >>> torch.allclose(back, torch.tensor(0.3)), logabsdet.shape
        (True, torch.Size([]))
    """
    inputs = inputs.clamp(0.0, 1.0)
    # Bins come first: a softmax along a last dimension of eight takes most of a training step.
    ends = knots(sizes.movedim((-2, -1), (0, 1)).contiguous(), 1)
    index = (inputs >= ends[1 if inverse else 0, 1:-1]).sum(0)
    # One gather for all: its backward is a scatter into a tensor of all knots.
    table = torch.cat([ends, unbounded.movedim(-1, 0).unsqueeze(0)])
    both = torch.stack([index, index + 1]).expand(3, 2, *index.shape)
    x, y, unbounded = table.gather(1, both).unbind()
    # Of the two that are used alone: a softplus of all would cost as much as the rest.
    (x0, x1), (y0, y1), (slope0, slope1) = (pair.unbind() for pair in (x, y, slopes(unbounded)))
    width, height = x1 - x0, y1 - y0
    delta = height / width
    bend = slope0 + slope1 - 2.0 * delta
    if inverse:
        rise = inputs - y0
        a = rise * bend + height * (delta - slope0)
        b = height * slope0 - rise * bend
        c = -delta * rise
        root = torch.sqrt((b * b - 4.0 * a * c).clamp_min(torch.finfo(a.dtype).tiny))
        theta = -2.0 * c / (b + root)
    else:
        theta = (inputs - x0) / width
    product = theta * (1.0 - theta)
    denominator = delta + bend * product
    derivative = (
        delta
        * delta
        * (slope1 * theta * theta + 2.0 * delta * product + slope0 * (1.0 - theta) ** 2)
    )
    logabsdet = torch.log(derivative) - 2.0 * torch.log(denominator)
    if inverse:
        return x0 + theta * width, -logabsdet
    return y0 + height * (delta * theta * theta + slope0 * product) / denominator, logabsdet
