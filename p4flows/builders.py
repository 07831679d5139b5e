"""Complete flows of the paper's experiments: transforms and a standard normal base."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from nflows.transforms.base import CompositeTransform, InverseTransform, Transform
from nflows.transforms.permutations import Permutation
from torch import arange, nn

from p4flows.arguments import check_positive_int
from p4flows.transforms import AffineCoupling, BentIdentity, BentStack, P4InvTransform

if TYPE_CHECKING:
    from nflows.flows.base import Flow


def bent_stacked_flow(
    features: int,
    blocks: int,
    *,
    rank: int | None = 1,
    fused: bool = True,
    perturbation: Literal["relative", "additive"] = "additive",
) -> "Flow":
    """Stacked P4Inv layers with Bent identities between them (Section 2.5, Appendix G).

    A block is [P4Inv, Bent identity, P4Inv, inverse Bent identity], matrices start as identity.

    Args:
        features: dimension n of the data.
        blocks: number of blocks; a block has 2·(2·rank + 1)·n trainable parameters.
        rank: number of columns of u and v; 1 is the paper, None the default of `P4InvTransform`.
        fused: whether to run all blocks as one `BentStack`.
        perturbation: "additive" is the paper, "relative" the default of `P4InvTransform`.

    Returns:
        An `nflows.flows.Flow`, data → noise in the forward direction, standard normal base.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when one is out of range.

    Example:
        >>> flow = bent_stacked_flow(2, 100)
        >>> sum(p.numel() for p in flow.parameters())
        1200
        >>> flow.sample(5).shape
        torch.Size([5, 2])
    """
    check_positive_int("blocks", blocks)
    if fused:
        return _flow(BentStack(features, blocks, rank=rank, perturbation=perturbation), features)
    transforms: list[Transform] = []
    for _ in range(blocks):
        transforms += [
            P4InvTransform(features, rank=rank, perturbation=perturbation),
            BentIdentity(),
            P4InvTransform(features, rank=rank, perturbation=perturbation),
            InverseTransform(BentIdentity()),
        ]
    return _flow(CompositeTransform(transforms), features)


def realnvp_flow(
    features: int,
    blocks: int,
    *,
    hidden: Sequence[int] = (60, 60),
    swap: Literal["p4", "permutation"] = "p4",
    rank: int | None = 1,
    perturbation: Literal["relative", "additive"] = "additive",
    shift_activation: type[nn.Module] = nn.ReLU,
    scale_activation: type[nn.Module] = nn.Tanh,
) -> "Flow":
    """RealNVP whose channels are mixed by P4Inv layers or swapped (Section 2.5, Figure 7).

    A block is [affine coupling, swap, affine coupling, swap].

    Args:
        features: dimension n of the data, at least 2.
        blocks: number of blocks.
        hidden: widths of the hidden layers of the shift and scale nets.
        swap: "p4" for P4Inv layers with bias that start as the reverse permutation,
            "permutation" for exchanging the two channels.
        rank: number of columns of u and v of the P4Inv layers; 1 is the paper, None the default
            of `P4InvTransform`.
        perturbation: "additive" is the paper, "relative" the default of `P4InvTransform`.
        shift_activation: class of the hidden activation of the shift nets.
        scale_activation: class of the hidden activation of the scale nets.

    Returns:
        An `nflows.flows.Flow`, data → noise in the forward direction, standard normal base.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when one is out of range.

    Example:
        >>> flow = realnvp_flow(2, 5, hidden=(6, 6), swap="permutation")
        >>> sum(p.numel() for p in flow.parameters())
        1230
    """
    check_positive_int("blocks", blocks)
    if swap not in ("p4", "permutation"):
        raise ValueError(f"swap must be 'p4' or 'permutation', got {swap!r}")
    transforms: list[Transform] = []
    for _ in range(2 * blocks):
        coupling = AffineCoupling(features, hidden, shift_activation, scale_activation)
        if swap == "p4":
            mixing: Transform = P4InvTransform(
                features, rank=rank, init="reverse", perturbation=perturbation
            )
        else:
            mixing = Permutation(arange(features).roll(-coupling.conditioning))
        transforms += [coupling, mixing]
    return _flow(CompositeTransform(transforms), features)


def _flow(transform: Transform, features: int) -> "Flow":
    # Imported here because nflows' distributions import matplotlib.
    from nflows.flows.base import Flow

    from p4flows.base_distribution import BaseNormal

    return Flow(transform, BaseNormal(features))
