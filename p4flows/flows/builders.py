"""Complete flows, transforms and base: the paper's experiments, and splines on R^p × T^q."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from nflows.transforms.base import CompositeTransform, Transform
from nflows.transforms.lu import LULinear
from nflows.transforms.permutations import Permutation
from torch import arange, nn, randperm

from p4flows.arguments import check_columns, check_positive_int
from p4flows.transforms import (
    AffineCoupling,
    BentStack,
    ColumnsTransform,
    P4InvTransform,
    SplineCoupling,
)

if TYPE_CHECKING:
    from nflows.flows.base import Flow


class _NoContext(nn.Module):
    """The embedding net of a flow without nets: a context would change nothing."""

    def forward(self, context: object) -> None:
        if context is not None:
            raise ValueError(
                "context came to a flow whose layers have no nets to see it: realnvp_flow and "
                "spline_flow take one, with context_features"
            )


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
        fused: whether to run all blocks as one `BentStack`; either loads the other's state_dict.
        perturbation: "additive" is the paper, "relative" the default of `P4InvTransform`.

    Returns:
        An `nflows.flows.Flow`, data → noise in the forward direction, standard normal base; it
        refuses a context, which none of its layers would see.

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
    stack = BentStack(features, blocks, rank=rank, perturbation=perturbation)
    transform = stack if fused else stack.to_composite()
    return _flow(transform, features, embedding_net=_NoContext())


def realnvp_flow(
    features: int,
    blocks: int,
    hidden: Sequence[int] = (60, 60),
    swap: Literal["p4", "permutation"] = "p4",
    *,
    rank: int | None = 1,
    perturbation: Literal["relative", "additive"] = "additive",
    shift_activation: type[nn.Module] = nn.ReLU,
    scale_activation: type[nn.Module] = nn.Tanh,
    context_features: int = 0,
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
        context_features: width of a context on which the density depends, `log_prob(x, context=c)`;
            0 is none.

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
    return _flow(CompositeTransform(transforms), features)


def spline_flow(
    features: int,
    blocks: int,
    *,
    circular: Sequence[int] = (),
    swap: Literal["p4", "lu", "permutation", "halves"] = "p4",
    rank: int | None = None,
    hidden: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    context_features: int = 0,
) -> "Flow":
    """Rational-quadratic spline couplings on R^p × T^q, mixed by P4Inv layers.

    A block is [coupling, coupling of the other columns, linear layer of the Euclidean columns]. The
    base is normal in the Euclidean columns and uniform in the circular ones.

    Args:
        features: n ≥ 2, the number of columns.
        blocks: number of blocks.
        circular: the columns that are angles in [−π, π), such as
            `MixedCoordinateTransform(..., circular=True).circular`.
        swap: what mixes the columns. "p4": P4Inv layers behind each block; "lu": nflows' `LULinear`
            in their place; "permutation": none, which is a fixed random permutation, because each
            block draws at random, from torch's global generator, which half it transforms first;
            "halves": the same halves in every block, as plain swaps have it.
        rank: number of columns of u and v of the P4Inv layers; None is their default.
        hidden: widths of the hidden layers of the couplings' nets.
        bins: bins of each spline.
        bound: the splines span [−bound, bound], in standard deviations of a standardised feature.
        context_features: width of a context on which the density depends, `log_prob(x, context=c)`;
            0 is none.

    Returns:
        An `nflows.flows.Flow`, data → noise in the forward direction.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when one is out of range.

    Example:
        >>> flow = spline_flow(6, 2, circular=[4, 5])
        >>> flow.sample(3).shape, flow.log_prob(flow.sample(3)).shape
        (torch.Size([3, 6]), torch.Size([3]))
    """
    check_positive_int("features", features)
    check_positive_int("blocks", blocks)
    check_columns("circular", circular, features)
    if features < 2:
        raise ValueError(f"features must be at least 2 to be split, got {features}")
    if swap not in ("p4", "lu", "permutation", "halves"):
        raise ValueError(f"swap must be 'p4', 'lu', 'permutation' or 'halves', got {swap!r}")
    if rank is not None and swap != "p4":
        raise ValueError(f"rank is that of P4Inv layers, got {rank} with swap={swap!r}")
    euclidean = [column for column in range(features) if column not in set(circular)]
    transforms: list[Transform] = []
    for _ in range(blocks):
        first = _half(euclidean, circular, at_random=swap != "halves")
        second = [column for column in range(features) if column not in set(first)]
        transforms += [
            SplineCoupling(
                features,
                half,
                circular=circular,
                hidden=hidden,
                bins=bins,
                bound=bound,
                context_features=context_features,
            )
            for half in (first, second)
        ]
        if not euclidean:
            continue
        if swap == "p4":
            linear = P4InvTransform(len(euclidean), rank=rank)
            transforms.append(ColumnsTransform(features, euclidean, linear))
        elif swap == "lu":
            linear = LULinear(len(euclidean), identity_init=True)
            transforms.append(ColumnsTransform(features, euclidean, linear))
    return _flow(CompositeTransform(transforms), features, circular)


def _half(euclidean: Sequence[int], circular: Sequence[int], at_random: bool) -> list[int]:
    """Half of either kind of columns, so that the sizes of the nets are always the same."""
    half: list[int] = []
    for columns, size in (
        (euclidean, (len(euclidean) + 1) // 2),
        # Rounded the other way, so that one column of each kind makes two halves.
        (circular, len(circular) // 2),
    ):
        order = randperm(len(columns)).tolist() if at_random else range(len(columns))
        half += [columns[index] for index in list(order)[:size]]
    return sorted(half)


def _flow(
    transform: Transform,
    features: int,
    circular: Sequence[int] = (),
    embedding_net: nn.Module | None = None,
) -> "Flow":
    # Imported here because nflows' distributions import matplotlib.
    from nflows.flows.base import Flow

    from p4flows.flows.base import BaseNormal, BaseNormalUniform

    base = BaseNormalUniform(features, circular) if circular else BaseNormal(features)
    return Flow(transform, base, embedding_net)
