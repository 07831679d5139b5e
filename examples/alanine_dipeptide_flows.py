"""The flows of the alanine dipeptide example: affine or spline couplings, swaps or P4Inv layers."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from nflows.distributions import StandardNormal
from nflows.flows.base import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import CompositeTransform, Permutation, Transform
from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform

from p4flows import P4InvTransform, realnvp_flow

FEATURES = 60

Swap = Literal["p4", "permutation"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A name for tables and how to build the flow."""

    title: str
    flow: Callable[[], Flow]


def affine_flow(swap: Swap, rank: int = 1) -> Flow:
    """Appendix H: 25 blocks of two affine couplings with nets of two hidden layers of 60."""
    return realnvp_flow(FEATURES, 25, swap=swap, rank=rank, perturbation="additive")


def spline_flow(swap: Swap, rank: int = 1, blocks: int = 4, hidden: int = 64) -> Flow:
    """Rational-quadratic splines of nflows (Durkan et al. 2019), two to a block, between swaps.

    A step takes as long as one of `affine_flow`. Splines of eight bins span five standard
    deviations and are the identity beyond.
    """
    half = FEATURES // 2
    transforms: list[Transform] = []
    for _ in range(2 * blocks):
        transforms.append(
            PiecewiseRationalQuadraticCouplingTransform(
                [0] * half + [1] * half,
                lambda inputs, outputs: ResidualNet(inputs, outputs, hidden, num_blocks=1),
                num_bins=8,
                tails="linear",
                tail_bound=5.0,
            )
        )
        if swap == "p4":
            transforms.append(
                P4InvTransform(FEATURES, rank=rank, init="reverse", perturbation="additive")
            )
        else:
            transforms.append(Permutation(torch.arange(FEATURES).roll(half)))
    return Flow(CompositeTransform(transforms), StandardNormal([FEATURES]))


MODELS = {
    "rnvp": Model("RNVP", lambda: affine_flow("permutation")),
    "p4inv": Model("P4Inv", lambda: affine_flow("p4")),
    "spline": Model("Spline", lambda: spline_flow("permutation")),
    "spline-p4inv": Model("Spline + P4Inv", lambda: spline_flow("p4")),
}
