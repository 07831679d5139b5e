"""The flows of the paper's experiments: Bent-stacked (Appendix G) and RealNVP (Appendix H)."""

from collections.abc import Sequence
from typing import Literal

from nflows.flows.base import Flow
from nflows.transforms.base import CompositeTransform, Transform
from nflows.transforms.permutations import Permutation
from torch import arange, nn

from p4flows.arguments import check_positive_int
from p4flows.flows.base import BaseNormal
from p4flows.transforms import AffineCoupling, BentStack, P4InvTransform

Perturbation = Literal["relative", "additive"]


class _NoContext(nn.Module):
    """The embedding net of a flow without nets: a context would change nothing."""

    def forward(self, context: object) -> None:
        if context is not None:
            raise ValueError(
                "context came to a flow whose layers have no nets to see it: realnvp_flow and "
                "spline_flow take one, with context_features"
            )


def _settings(
    paper: bool, rank: int | None, perturbation: Perturbation | None
) -> tuple[int | None, Perturbation]:
    if not paper:
        return rank, "relative" if perturbation is None else perturbation
    if rank not in (None, 1):
        raise ValueError(f"rank must be 1 with paper=True, got {rank}")
    if perturbation not in (None, "additive"):
        raise ValueError(f"perturbation must be 'additive' with paper=True, got {perturbation!r}")
    return 1, "additive"


def bent_stacked_flow(
    features: int,
    blocks: int,
    *,
    paper: bool = False,
    rank: int | None = None,
    perturbation: Perturbation | None = None,
    fused: bool = True,
) -> Flow:
    """Stacked P4Inv layers with Bent identities between them (Section 2.5, Appendix G).

    A block is [P4Inv, Bent identity, P4Inv, inverse Bent identity], matrices start as identity.

    Args:
        features: dimension n of the data.
        blocks: number of blocks.
        paper: the paper's P4Inv layers, rank=1 and perturbation="additive", with 3·n trainable
            parameters in each; `MergeHook.paper` trains them as the paper does.
        rank: number of columns of u and v; None is the default of `P4InvTransform`.
        perturbation: "relative" or "additive"; None is the default of `P4InvTransform`.
        fused: whether to run all blocks as one `BentStack`.

    Returns:
        An `nflows.flows.Flow`, data → noise in the forward direction, standard normal base; it
        refuses a context, which none of its layers would see.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when one is out of range, or rank or perturbation contradict paper=True.

    Example:
        >>> flow = bent_stacked_flow(2, 100, paper=True)
        >>> sum(p.numel() for p in flow.parameters())
        1200
        >>> flow.sample(5).shape
        torch.Size([5, 2])
    """
    rank, perturbation = _settings(paper, rank, perturbation)
    stack = BentStack(features, blocks, rank=rank, perturbation=perturbation)
    transform = stack if fused else stack.to_composite()
    return Flow(transform, BaseNormal(features), _NoContext())


def realnvp_flow(
    features: int,
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
) -> Flow:
    """RealNVP whose channels are mixed by P4Inv layers or swapped (Section 2.5, Figure 7).

    A block is [affine coupling, swap, affine coupling, swap].

    Args:
        features: dimension n of the data, at least 2.
        blocks: number of blocks.
        hidden: widths of the hidden layers of the shift and scale nets.
        swap: "p4" for P4Inv layers with bias that start as the reverse permutation,
            "permutation" for exchanging the two channels.
        paper: the paper's P4Inv layers, rank=1 and perturbation="additive"; `MergeHook.paper`
            trains them as the paper does.
        rank: number of columns of u and v; None is the default of `P4InvTransform`.
        perturbation: "relative" or "additive"; None is the default of `P4InvTransform`.
        shift_activation: class of the hidden activation of the shift nets.
        scale_activation: class of the hidden activation of the scale nets.
        context_features: width of a context on which the density depends, `log_prob(x, context=c)`;
            0 is none.

    Returns:
        An `nflows.flows.Flow`, data → noise in the forward direction, standard normal base.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when one is out of range, or rank or perturbation contradict paper=True.

    Example:
        >>> flow = realnvp_flow(2, 5, hidden=(6, 6), swap="permutation")
        >>> sum(p.numel() for p in flow.parameters())
        1230
    """
    check_positive_int("blocks", blocks)
    if swap not in ("p4", "permutation"):
        raise ValueError(f"swap must be 'p4' or 'permutation', got {swap!r}")
    rank, perturbation = _settings(paper, rank, perturbation)
    transforms: list[Transform] = []
    for _ in range(2 * blocks):
        coupling = AffineCoupling(
            features, hidden, shift_activation, scale_activation, context_features
        )
        if swap == "p4":
            mixing: Transform = P4InvTransform(
                features, rank=rank, init="reverse", perturbation=perturbation
            )
        else:
            mixing = Permutation(arange(features).roll(-coupling.conditioning))
        transforms += [coupling, mixing]
    return Flow(CompositeTransform(transforms), BaseNormal(features))
