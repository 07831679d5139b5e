"""The layers as bgflow Flows, and adapters both ways; bgflow is imported here and nowhere else.

A Flow is called as `flow(x, inverse=False)` and returns `(y, dlogp)`, where x has any leading
batch shape and dlogp has shape `(..., 1)`. All mathematics stays in `p4flows.transforms`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from nflows.transforms.base import Transform
from nflows.transforms.linear import Linear
from torch import Tensor, nn

from p4flows import flows
from p4flows.arguments import check_floating
from p4flows.matrices import MergeBounds
from p4flows.transforms import BentIdentity, BentStack, P4InvTransform

try:
    from bgflow import Flow
except (ImportError, AttributeError) as error:  # AttributeError: a constant that NumPy 2 removed
    raise ImportError(
        "p4flows.bgflow needs bgflow and numpy < 2: docs/bgflow.md has the command to install them"
    ) from error

Perturbation = Literal["relative", "additive"]


class TransformFlow(Flow):
    """An nflows Transform of rows as a bgflow Flow.

    It maps tensors of shape `(..., n)`, with dlogp of shape `(..., 1)`. A context of shape
    `(..., m)` is given as `flow(x, context=context)`, through a SequentialFlow as well.

    Args:
        transform: maps rows of shape `(N, n)`. It is not copied.

    Attributes:
        transform: the very same object, which keeps its parameters.

    Raises:
        TypeError: when the transform is not an nflows Transform; when the flow is called with
            several tensors or with one that is not floating-point.
        ValueError: when the batch shape of a context is not that of the inputs.

    Example:
        >>> import torch
        >>> from nflows.transforms import LULinear
        >>> y, dlogp = TransformFlow(LULinear(3))(torch.randn(5, 2, 3))
        >>> y.shape, dlogp.shape
        (torch.Size([5, 2, 3]), torch.Size([5, 2, 1]))
    """

    def __init__(self, transform: Transform) -> None:
        if not isinstance(transform, Transform):
            raise TypeError(
                f"transform must be an nflows Transform, got {type(transform).__name__}"
            )
        super().__init__()
        self.transform = transform

    # Other keywords, temperature among them, are accepted and ignored as by bgflow's own layers.
    def _forward(
        self, *xs: Tensor, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return _apply_to_rows(self.transform, xs, context)

    def _inverse(
        self, *xs: Tensor, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return _apply_to_rows(self.transform.inverse, xs, context)


def _apply_to_rows(
    direction: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
    xs: tuple[Tensor, ...],
    context: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One direction of a transform, with all batch dimensions as one."""
    if len(xs) != 1:
        raise TypeError(f"the flow maps a single tensor, got {len(xs)}: join them with a MergeFlow")
    inputs = xs[0]
    check_floating(inputs)
    batch = inputs.shape[:-1]
    if context is not None:
        if context.shape[:-1] != batch:
            raise ValueError(
                f"context must have the batch shape of the inputs, {tuple(batch)}, got a tensor of "
                f"shape {tuple(context.shape)}"
            )
        context = context.reshape(-1, context.shape[-1])
    outputs, logabsdet = direction(inputs.reshape(-1, inputs.shape[-1]), context)
    return outputs.reshape(*batch, outputs.shape[-1]), logabsdet.reshape(*batch, 1)


class FlowTransform(Transform):
    """A bgflow Flow of a single tensor as an nflows Transform.

    It maps inputs of shape `(N, ..., n)`, with logabsdet of shape `(N,)`. A context is handed on as
    the keyword `context`, which bgflow's own layers ignore.

    Args:
        flow: maps one tensor to one tensor; several inside a SequentialFlow are fine. It is not
            copied.

    Attributes:
        flow: the very same object, which keeps its parameters.

    Raises:
        TypeError: when the flow is not a bgflow Flow; when the transform is called with a tensor
            that is not floating-point.
        ValueError: when the flow returns several tensors.

    Example:
        >>> import torch
        >>> outputs, logabsdet = FlowTransform(P4InvFlow(3))(torch.randn(5, 3))
        >>> outputs.shape, logabsdet.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(self, flow: Flow) -> None:
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a bgflow Flow, got {type(flow).__name__}")
        super().__init__()
        self.flow = flow

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The flow's forward direction."""
        return self._apply_flow(inputs, context, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The flow's inverse direction."""
        return self._apply_flow(inputs, context, inverse=True)

    def _apply_flow(
        self, inputs: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        check_floating(inputs)
        keywords = {} if context is None else {"context": context}
        *outputs, dlogp = self.flow(inputs, inverse=inverse, **keywords)
        if len(outputs) != 1:
            raise ValueError(
                f"flow must map one tensor to one, got {len(outputs)}: end it with a MergeFlow"
            )
        # nflows has one log-determinant for each entry of the first dimension.
        return outputs[0], dlogp.flatten(1).sum(-1)


class P4InvFlow(TransformFlow):
    """Linear layer y = Ã x + b with a free invertible matrix, in place of bgflow's InvertiblePPPP.

    Args:
        dim: n.
        rank: number of columns of u and v; None is the default of `P4InvTransform`.
        init: "identity", "reverse", a matrix, or an nflows `Linear`.
        bias: whether to add a trainable b.
        using_cache: in eval mode and without gradients, form Ã once and use one matrix product.
        bounds: when a merge is accepted.
        perturbation: "relative" or "additive"; see `P4InvTransform`.

    Example:
        >>> import torch
        >>> flow = P4InvFlow(3, init="reverse", bias=False)
        >>> y, dlogp = flow(torch.tensor([1.0, 2.0, 3.0]))
        >>> y.tolist(), dlogp.tolist()
        ([3.0, 2.0, 1.0], [0.0])
        >>> flow(y, inverse=True)[0].tolist()
        [1.0, 2.0, 3.0]
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int | None = None,
        init: str | Tensor | Linear = "identity",
        bias: bool = True,
        using_cache: bool = False,
        bounds: MergeBounds = MergeBounds(),
        perturbation: Perturbation = "relative",
    ) -> None:
        layer = P4InvTransform(
            dim,
            rank=rank,
            init=init,
            bias=bias,
            using_cache=using_cache,
            bounds=bounds,
            perturbation=perturbation,
        )
        super().__init__(layer)


class BentIdentityFlow(TransformFlow):
    """Elementwise Bent identity (Section 2.5), in place of bgflow's BentIdentity.

    Example:
        >>> import torch
        >>> y, dlogp = BentIdentityFlow()(torch.zeros(5, 2))
        >>> y.abs().max().item(), dlogp.shape
        (0.0, torch.Size([5, 1]))
    """

    def __init__(self) -> None:
        super().__init__(BentIdentity())


class BentStackFlow(TransformFlow):
    """Blocks of [P4Inv, Bent identity, P4Inv, inverse Bent identity] as one layer (Appendix G).

    Args:
        dim: n.
        blocks: number of blocks.
        rank: number of columns of u and v; None is the default of `BentStack`.
        bounds: when a merge is accepted.
        perturbation: "relative" or "additive"; see `BentStack`.

    Example:
        >>> flow = BentStackFlow(2, blocks=100, rank=1, perturbation="additive")
        >>> sum(p.numel() for p in flow.parameters())
        1200
    """

    def __init__(
        self,
        dim: int,
        blocks: int,
        *,
        rank: int | None = None,
        bounds: MergeBounds = MergeBounds(),
        perturbation: Perturbation = "relative",
    ) -> None:
        super().__init__(
            BentStack(dim, blocks, rank=rank, bounds=bounds, perturbation=perturbation)
        )


def realnvp_flow(
    dim: int,
    blocks: int,
    hidden: Sequence[int] = (60, 60),
    swap: Literal["p4", "permutation"] = "p4",
    *,
    paper: bool = False,
    rank: int | None = None,
    perturbation: Perturbation | None = None,
    shift_activation: type[nn.Module] = nn.ReLU,
    scale_activation: type[nn.Module] = nn.Tanh,
    context_features: int = 0,
) -> TransformFlow:
    """The transform of `p4flows.realnvp_flow`, which says what the arguments are, as a Flow.

    Forward is data → noise, as it is there.

    Example:
        >>> flow = realnvp_flow(60, 25, paper=True)
        >>> sum(p.numel() for p in flow.parameters()) == 735_050 + 9_000
        True
    """
    flow = flows.realnvp_flow(
        dim,
        blocks,
        hidden,
        swap,
        paper=paper,
        rank=rank,
        perturbation=perturbation,
        shift_activation=shift_activation,
        scale_activation=scale_activation,
        context_features=context_features,
    )
    return TransformFlow(flow._transform)
