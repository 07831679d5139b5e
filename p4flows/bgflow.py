"""The layers as bgflow Flows, and adapters both ways; bgflow is imported here and nowhere else.

A Flow is called as `flow(x, inverse=False)` and returns `(y, dlogp)`, where x has any leading
batch shape and dlogp has shape `(..., 1)`. All mathematics stays in `p4flows.transforms`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from nflows.transforms.base import Transform
from torch import Tensor, nn

from p4flows.arguments import check_floating, check_positive_int
from p4flows.transforms import BentIdentity, BentStack, P4InvTransform, P4OrthogonalTransform

try:
    from bgflow import (
        AffineTransformer,
        CouplingFlow,
        DenseNet,
        Flow,
        MergeFlow,
        SequentialFlow,
        SplitFlow,
        SwapFlow,
    )
except (ImportError, AttributeError) as error:  # AttributeError: a constant that NumPy 2 removed
    raise ImportError(
        "p4flows.bgflow needs bgflow and numpy < 2: docs/bgflow.md has the command to install them"
    ) from error


class TransformFlow(Flow):
    """An nflows Transform of rows as a bgflow Flow, by its other name `as_flow`.

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
        >>> y, dlogp = as_flow(LULinear(3))(torch.randn(5, 2, 3))
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


as_flow = TransformFlow


class FlowTransform(Transform):
    """A bgflow Flow of a single tensor as an nflows Transform, by its other name `as_transform`.

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
        >>> outputs, logabsdet = as_transform(P4InvFlow(3))(torch.randn(5, 3))
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


as_transform = FlowTransform


class P4InvFlow(TransformFlow):
    """Linear layer y = Ã x + b with a free invertible matrix, in place of bgflow's InvertiblePPPP.

    Args:
        dim: n.
        **options: those of `P4InvTransform`, which refuses what does not fit.

    Example:
        >>> import torch
        >>> flow = P4InvFlow(3, init="reverse", bias=False)
        >>> y, dlogp = flow(torch.tensor([1.0, 2.0, 3.0]))
        >>> y.tolist(), dlogp.tolist()
        ([3.0, 2.0, 1.0], [0.0])
        >>> flow(y, inverse=True)[0].tolist()
        [1.0, 2.0, 3.0]
    """

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(P4InvTransform(dim, **options))


class P4OrthogonalFlow(TransformFlow):
    """Linear layer y = Ã x + b with an orthogonal matrix; ln|det| is 0.

    Args:
        dim: n.
        **options: those of `P4OrthogonalTransform`, which refuses what does not fit.

    Example:
        >>> import torch
        >>> y, dlogp = P4OrthogonalFlow(3, init="reverse")(torch.tensor([1.0, 2.0, 3.0]))
        >>> y.tolist(), dlogp.tolist()
        ([3.0, 2.0, 1.0], [0.0])
    """

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(P4OrthogonalTransform(dim, **options))


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
        **options: those of `BentStack`, which refuses what does not fit.

    Example:
        >>> flow = BentStackFlow(2, blocks=100, rank=1, perturbation="additive")
        >>> sum(p.numel() for p in flow.parameters())
        1200
    """

    def __init__(self, dim: int, blocks: int, **options: Any) -> None:
        super().__init__(BentStack(dim, blocks, **options))


def realnvp_flow(
    dim: int,
    blocks: int,
    hidden: Sequence[int] = (60, 60),
    swap: Literal["p4", "permutation"] = "p4",
    *,
    rank: int | None = 1,
    perturbation: Literal["relative", "additive"] = "additive",
    shift_activation: type[nn.Module] = nn.ReLU,
    scale_activation: type[nn.Module] = nn.Tanh,
) -> SequentialFlow:
    """RealNVP of bgflow's own parts, channels mixed by P4Inv layers or swapped (Figure 7).

    The flow of `p4flows.realnvp_flow`, which says what the arguments are and what is refused: with
    the same weights, whose order is the same, both have the same forward and inverse direction.
    Conditional ones are those of nflows, by `as_flow`.

    Example:
        >>> flow = realnvp_flow(60, 25)
        >>> sum(p.numel() for p in flow.parameters()) == 735_050 + 9_000
        True
    """
    check_positive_int("dim", dim)
    check_positive_int("blocks", blocks)
    if dim < 2:
        raise ValueError(f"dim must be at least 2 to be split, got {dim}")
    if swap not in ("p4", "permutation"):
        raise ValueError(f"swap must be 'p4' or 'permutation', got {swap!r}")
    first = (dim + 1) // 2
    widths = (first, *hidden, dim - first)
    layers: list[Flow] = []
    for _ in range(2 * blocks):
        transformer = AffineTransformer(
            shift_transformation=DenseNet(widths, shift_activation()),
            scale_transformation=DenseNet(widths, scale_activation()),
        )
        layers += [SplitFlow(first), CouplingFlow(transformer)]
        if swap == "p4":
            mixing = P4InvFlow(dim, rank=rank, init="reverse", perturbation=perturbation)
            layers += [MergeFlow(first), mixing]
        else:
            layers += [SwapFlow(), MergeFlow(dim - first)]
    return SequentialFlow(layers)
