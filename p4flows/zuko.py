"""P4 layers as zuko's lazy transforms."""

from typing import Any, Literal

import torch
from nflows.transforms.linear import Linear
from torch import Tensor
from torch.distributions import Transform, constraints

from p4flows.matrices import MergeBounds
from p4flows.transforms import P4InvTransform

try:
    from zuko.lazy import Flow, LazyTransform
except ImportError as error:
    raise ImportError("p4flows.zuko needs zuko: pip install zuko") from error


class P4Transform(LazyTransform):
    """`P4InvTransform` among the transforms of a zuko flow; the context is ignored.

    Args:
        features: n.
        rank: number of columns of u and v; None is the default of `P4InvTransform`.
        init: "identity", "reverse", a matrix, or another nflows `Linear`.
        bias: whether to add a trainable b.
        using_cache: in eval mode and without gradients, form Ã once and use one matrix product.
        bounds: when a merge is accepted.
        perturbation: "relative" or "additive"; see `P4InvTransform`.

    Attributes:
        layer: the `P4InvTransform`, for a `MergeHook`, as the flow as a whole is.

    Raises:
        TypeError: as for `P4InvTransform`.
        ValueError: as for `P4InvTransform`.

    Example:
        >>> from zuko.flows import Flow, UnconditionalDistribution
        >>> from zuko.distributions import DiagNormal
        >>> base = UnconditionalDistribution(DiagNormal, torch.zeros(3), torch.ones(3), buffer=True)
        >>> flow = Flow([P4Transform(3)], base)
        >>> flow().log_prob(torch.ones(5, 3)).shape, flow().sample((2,)).shape
        (torch.Size([5]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        features: int,
        *,
        rank: int | None = None,
        init: str | Tensor | Linear = "identity",
        bias: bool = True,
        using_cache: bool = False,
        bounds: MergeBounds = MergeBounds(),
        perturbation: Literal["relative", "additive"] = "relative",
    ) -> None:
        super().__init__()
        self.layer = P4InvTransform(
            features,
            rank=rank,
            init=init,
            bias=bias,
            using_cache=using_cache,
            bounds=bounds,
            perturbation=perturbation,
        )

    def forward(self, c: Any = None) -> Transform:
        """The transform x → Ã x + b of torch.distributions, at any context."""
        return _Rows(self.layer)


def with_linear(
    flow: Flow,
    features: int,
    *,
    rank: int | None = None,
    perturbation: Literal["relative", "additive"] = "relative",
) -> Flow:
    """A ready-made flow of zuko's with a `P4Transform` between its transforms.

    Args:
        flow: such as `zuko.flows.NSF(3)`; its transforms and base are shared, not copied.
        features: n.
        rank: number of columns of u and v; None is the default of `P4InvTransform`.
        perturbation: "relative" or "additive"; see `P4InvTransform`.

    Returns:
        A new flow, at first with the density of the given one.

    Raises:
        TypeError: when it is not a flow of zuko's.
        ValueError: when it has a single transform, or an option is out of range.

    Example:
        >>> from zuko.flows import NSF
        >>> flow = with_linear(NSF(3, transforms=3), 3)
        >>> [type(transform).__name__ for transform in flow.transform.transforms][:2]
        ['MaskedAutoregressiveTransform', 'P4Transform']
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"flow must be a zuko Flow, got {type(flow).__name__}")
    transforms = list(getattr(flow.transform, "transforms", ()))
    if len(transforms) < 2:
        raise ValueError(f"flow must have two transforms or more, got {max(len(transforms), 1)}")
    mixed = transforms[:1]
    for transform in transforms[1:]:
        mixed += [P4Transform(features, rank=rank, perturbation=perturbation), transform]
    return Flow(mixed, flow.base)


class _Rows(Transform):
    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, layer: P4InvTransform, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.layer = layer

    def with_cache(self, cache_size: int = 1) -> Transform:
        return _Rows(self.layer, cache_size)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """zuko's shortcut: outputs and log-determinant at once."""
        y, logabsdet = self.layer(x.reshape(-1, x.shape[-1]))
        return y.reshape(x.shape), logabsdet.reshape(x.shape[:-1])

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        x, _ = self.layer.inverse(y.reshape(-1, y.shape[-1]))
        return x.reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer.logabsdet().expand(torch.broadcast_shapes(x.shape, y.shape)[:-1])
