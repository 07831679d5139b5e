"""Who takes part in learning.py: a linear layer, its optimizer and its hook, by name."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from contestants import Normflows, Zflows, reflections
from nflows.transforms import (
    CompositeTransform,
    LULinear,
    NaiveLinear,
    Permutation,
    QRLinear,
    Transform,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from p4flows import MergeHook, P4InvTransform

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
# Larger ones diverge in the first steps, where the data has not been whitened yet.
SGD_RATES = (3e-3, 1e-2, 3e-2, 1e-1)


def adam(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    return torch.optim.Adam(parameters, lr=rate, fused=True)


def sgd(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    return torch.optim.SGD(parameters, lr=rate)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A layer and how it is trained.

    Attributes:
        title: in tables and figures.
        layer: the Transform for n features.
        hook: what is called with (flow, optimizer) before training.
        optimizer: what is called with (parameters, rate).
        rates: the grid that its rate is chosen from.
        up_to: the largest n; beyond it a step would take too long.
        needs: the library it comes from.
        flow, ica: whether it takes part among couplings and alone.
    """

    title: str
    layer: Callable[[int], Transform]
    hook: Callable[[nn.Module, Optimizer], Any] | None = None
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer] = adam
    rates: tuple[float, ...] = RATES
    up_to: int = 1024
    needs: str = "nflows"
    flow: bool = True
    ica: bool = True

    def takes_part(self, task: str, features: int) -> bool:
        wanted = self.ica if task.startswith("ica") else self.flow
        found = importlib.util.find_spec(self.needs) is not None
        return wanted and found and features <= self.up_to


class Rows(Transform):
    """A layer of another library as an nflows Transform."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, logabsdet = self.layer(inputs)
        return outputs, logabsdet.expand(len(inputs))


class _RelativeGradient(torch.autograd.Function):
    """x Aᵀ whose gradient with respect to A is the relative one, dL/dA AᵀA, in O(n²N)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        outputs = inputs @ weight.T
        ctx.save_for_backward(outputs, weight)
        # The log-determinant is what its gradient makes it: training does not need its value.
        return outputs, inputs.new_zeros(len(inputs))

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor, d_logabsdet: Tensor) -> tuple[Tensor | None, Tensor]:
        outputs, weight = ctx.saved_tensors
        d_inputs = d_outputs @ weight if ctx.needs_input_grad[0] else None
        return d_inputs, d_outputs.T @ (outputs @ weight) + d_logabsdet.sum() * weight


class RelativeGradientLinear(Transform):
    """A free matrix trained by relative gradients (Gresele et al. 2020)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(features).flip(0).contiguous())
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            outputs, logabsdet = _RelativeGradient.apply(inputs, self.weight)
            return outputs + self.bias, logabsdet
        logabsdet = torch.linalg.slogdet(self.weight).logabsdet
        return inputs @ self.weight.T + self.bias, logabsdet.expand(len(inputs))


def swap(features: int) -> Transform:
    """Exchanges the halves that a coupling reads and changes."""
    return Permutation(torch.arange(features).roll(features // 2))


def random_permutation(features: int) -> Transform:
    return Permutation(torch.randperm(features))


def swapped(layer: nn.Module, features: int) -> Transform:
    """A layer that starts at or near the identity, behind a swap of the halves."""
    return CompositeTransform([swap(features), layer])


def naive(features: int) -> Transform:
    """A free matrix, its log-determinant by LU in every step; from the reverse permutation."""
    layer = NaiveLinear(features)
    with torch.no_grad():
        layer._weight.copy_(torch.eye(features).flip(0))
        layer.bias.zero_()
    return layer


def normflows_lu(features: int) -> Transform:
    from normflows.flows import LULinearPermute

    return Rows(Normflows(LULinearPermute(features)))


def normflows_affine(features: int) -> Transform:
    from normflows.flows import InvertibleAffine

    return Rows(Normflows(InvertibleAffine(features)))


def zflows_lu(features: int) -> Transform:
    from zflows.core.flows import LinearMixingTransform

    return swapped(Rows(Zflows(LinearMixingTransform(features, kind="lu"))), features)


def zuko_lu(features: int) -> Transform:
    from zuko.lazy import UnconditionalTransform
    from zuko.transforms import LULinearTransform

    layer = UnconditionalTransform(LULinearTransform, torch.eye(features))
    return swapped(Rows(Zflows(layer)), features)


REFERENCE = "lu"
CONTESTANTS = {
    "p4": Contestant("P4Inv", lambda n: P4InvTransform(n, init="reverse"), MergeHook),
    "p4-paper": Contestant(
        "P4Inv, the paper's settings",
        lambda n: P4InvTransform(n, rank=1, perturbation="additive", init="reverse"),
        MergeHook.paper,
    ),
    REFERENCE: Contestant("nflows LULinear", lambda n: swapped(LULinear(n, identity_init=True), n)),
    "qr": Contestant(
        "nflows QRLinear", lambda n: swapped(QRLinear(n, reflections(n)), n), up_to=256
    ),
    "naive": Contestant("nflows NaiveLinear", naive),
    "swap": Contestant("swaps", swap, ica=False),
    "random": Contestant("random permutations", random_permutation, ica=False),
    "normflows-lu": Contestant("normflows LULinearPermute", normflows_lu, needs="normflows"),
    "normflows-affine": Contestant(
        "normflows InvertibleAffine", normflows_affine, up_to=256, needs="normflows"
    ),
    "zflows-lu": Contestant("zflows mixing, LU", zflows_lu, up_to=256, needs="zflows"),
    "zuko-lu": Contestant("zuko LULinearTransform", zuko_lu, up_to=256, needs="zuko"),
    "relative": Contestant("relative gradient, Adam", RelativeGradientLinear),
    "relative-sgd": Contestant(
        "relative gradient, SGD",
        RelativeGradientLinear,
        optimizer=sgd,
        rates=SGD_RATES,
        flow=False,
    ),
}
