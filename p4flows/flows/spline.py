"""Rational-quadratic spline flows on R^p × T^q, with P4Inv layers between the couplings."""

from collections.abc import Sequence
from typing import Literal

from nflows.flows.base import Flow
from nflows.transforms.base import CompositeTransform, Transform
from nflows.transforms.lu import LULinear
from torch import randperm

from p4flows.arguments import check_columns, check_positive_int
from p4flows.flows.base import BaseNormal, BaseNormalUniform
from p4flows.transforms import ColumnsTransform, P4InvTransform, SplineCoupling


def spline_flow(
    features: int,
    blocks: int,
    *,
    circular: Sequence[int] = (),
    swap: Literal["p4", "lu", "random-halves", "halves"] = "p4",
    rank: int | None = None,
    perturbation: Literal["relative", "additive"] = "relative",
    hidden: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    context_features: int = 0,
) -> Flow:
    """Rational-quadratic spline couplings on R^p × T^q, mixed by P4Inv layers.

    A block is [coupling, coupling of the other columns, linear layer of the Euclidean columns]. The
    base is normal in the Euclidean columns and uniform in the circular ones.

    Args:
        features: n ≥ 2, the number of columns.
        blocks: number of blocks.
        circular: the columns that are angles in [−π, π), such as
            `MixedCoordinateTransform(..., circular=True).circular`.
        swap: what mixes the columns. "p4": P4Inv layers behind each block; "lu": nflows' `LULinear`
            in their place; "random-halves": no layer. With these three each block draws at random,
            from torch's global generator, which half it transforms first. "halves": no layer, and
            the same halves in every block, as `realnvp_flow(swap="permutation")` has it.
        rank: number of columns of u and v of the P4Inv layers; None is their default.
        perturbation: "relative" or "additive", that of the P4Inv layers.
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
    if swap not in ("p4", "lu", "random-halves", "halves"):
        raise ValueError(f"swap must be 'p4', 'lu', 'random-halves' or 'halves', got {swap!r}")
    if rank is not None and swap != "p4":
        raise ValueError(f"rank is that of P4Inv layers, got {rank} with swap={swap!r}")
    if perturbation != "relative" and swap != "p4":
        raise ValueError(
            f"perturbation is that of P4Inv layers, got {perturbation!r} with swap={swap!r}"
        )
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
            linear = P4InvTransform(len(euclidean), rank=rank, perturbation=perturbation)
            transforms.append(ColumnsTransform(features, euclidean, linear))
        elif swap == "lu":
            linear = LULinear(len(euclidean), identity_init=True)
            transforms.append(ColumnsTransform(features, euclidean, linear))
    base = BaseNormalUniform(features, circular) if circular else BaseNormal(features)
    return Flow(CompositeTransform(transforms), base)


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
