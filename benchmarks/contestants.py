"""The learnable linear layers of several libraries behind one interface.

A contestant is a module whose `forward` and `inverse` map rows to (outputs, logabsdet). bgflow,
normflows and zflows take part where they are importable.
"""

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
from nflows.transforms import LULinear, NaiveLinear, QRLinear, SVDLinear
from torch import Tensor, nn

from p4flows import P4InvTransform

# More would only make them slower; n of them are needed to reach every orthogonal matrix.
HOUSEHOLDER_REFLECTIONS = 16

Result = tuple[Tensor, Tensor]


class Dense(nn.Module):
    """nn.Linear: what a layer costs that knows neither inverse nor determinant."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)

    def forward(self, inputs: Tensor) -> Result:
        return self.linear(inputs), inputs.new_zeros(len(inputs))


class Normflows(nn.Module):
    """A layer of normflows, whose `inverse` is the direction of the density."""

    def __init__(self, layer: nn.Module, trailing: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layer = layer
        self.trailing = trailing

    def forward(self, inputs: Tensor) -> Result:
        return self._run(self.layer.inverse, inputs)

    def inverse(self, inputs: Tensor) -> Result:
        return self._run(self.layer.forward, inputs)

    def _run(self, direction: Callable[[Tensor], Result], inputs: Tensor) -> Result:
        outputs, logabsdet = direction(inputs.reshape(*inputs.shape, *self.trailing))
        return outputs.reshape(inputs.shape), logabsdet


class Zflows(nn.Module):
    """A layer of zflows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Result:
        return self.layer().call_and_ladj(inputs)

    def inverse(self, inputs: Tensor) -> Result:
        outputs = self.layer().inv(inputs)
        return outputs, -self.layer().log_abs_det_jacobian(outputs, inputs)


class Bgflow(nn.Module):
    """A layer of bgflow."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Result:
        return self.layer(inputs)

    def inverse(self, inputs: Tensor) -> Result:
        return self.layer(inputs, inverse=True)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """How to build a layer, and how far it goes.

    Attributes:
        build: a layer of n features.
        up_to: the largest n in the benchmark; what is O(n³) a step takes too long beyond.
        invertible: whether it has an inverse that works.
        needs: the library it comes from.
    """

    build: Callable[[int], nn.Module]
    up_to: int = 4096
    invertible: bool = True
    needs: str = "torch"

    def is_available(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


def normflows_affine(features: int) -> nn.Module:
    from normflows.flows import InvertibleAffine

    return Normflows(InvertibleAffine(features))


def normflows_lu(features: int) -> nn.Module:
    from normflows.flows import LULinearPermute

    return Normflows(LULinearPermute(features))


def normflows_convolution(features: int) -> nn.Module:
    from normflows.flows import Invertible1x1Conv

    return Normflows(Invertible1x1Conv(features), trailing=(1, 1))


def zflows_lu(features: int) -> nn.Module:
    from zflows.core.flows import LinearMixingTransform

    return Zflows(LinearMixingTransform(features, kind="lu"))


def zflows_rotation(features: int) -> nn.Module:
    from zflows.core.flows import LinearMixingTransform

    return Zflows(LinearMixingTransform(features, kind="rotation"))


def bgflow_pppp(features: int) -> nn.Module:
    from bgflow import InvertiblePPPP

    return Bgflow(InvertiblePPPP(features))


def reflections(features: int) -> int:
    return min(features, HOUSEHOLDER_REFLECTIONS)


P4INV = "P4InvTransform"
P4INV_PAPER = "P4InvTransform as in the paper"
LINEAR = "nn.Linear"

CONTESTANTS = {
    P4INV: Contestant(P4InvTransform),
    P4INV_PAPER: Contestant(lambda n: P4InvTransform(n, rank=1, perturbation="additive")),
    LINEAR: Contestant(Dense, invertible=False),
    "nflows LULinear": Contestant(LULinear, up_to=2048),
    "nflows QRLinear": Contestant(lambda n: QRLinear(n, reflections(n)), up_to=1024),
    "nflows SVDLinear": Contestant(lambda n: SVDLinear(n, reflections(n)), up_to=1024),
    # Its inverse calls torch.solve, which torch has no longer.
    "nflows NaiveLinear": Contestant(NaiveLinear, up_to=2048, invertible=False),
    "normflows InvertibleAffine": Contestant(normflows_affine, up_to=1024, needs="normflows"),
    "normflows LULinearPermute": Contestant(normflows_lu, up_to=2048, needs="normflows"),
    "normflows Invertible1x1Conv": Contestant(normflows_convolution, up_to=1024, needs="normflows"),
    "zflows mixing, LU": Contestant(zflows_lu, up_to=256, needs="zflows"),
    "zflows mixing, rotation": Contestant(zflows_rotation, up_to=256, needs="zflows"),
    "bgflow InvertiblePPPP": Contestant(bgflow_pppp, needs="bgflow"),
}


def entering(size: int) -> dict[str, Contestant]:
    """The contestants that take part at this n."""
    return {
        name: contestant
        for name, contestant in CONTESTANTS.items()
        if contestant.is_available() and size <= contestant.up_to
    }


def missing() -> set[str]:
    """Libraries that are not importable here."""
    return {c.needs for c in CONTESTANTS.values() if not c.is_available()}


def negative_log_likelihood(outputs: Tensor, logabsdet: Tensor) -> Tensor:
    """The loss of every contestant, with a standard normal base."""
    return (0.5 * outputs.square().sum(-1) - logabsdet).mean()


def training_step(
    layer: nn.Module, inputs: Tensor, direction: Callable[[Tensor], Result]
) -> Callable[[], None]:
    """One step of Adam, the gradient with respect to the inputs included.

    The learning rate is so small that a layer stays where it is however often it is timed.
    """
    inputs = inputs.clone().requires_grad_()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        inputs.grad = None
        negative_log_likelihood(*direction(inputs)).backward()
        optimizer.step()

    return step
