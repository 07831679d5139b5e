"""Every public transform, name → constructor, and how to move one off its start.

At its start a P4 layer is the identity, where a log-determinant of 0 and an inverse Aᵀ are right.
A new transform is one more line in `CONSTRUCTORS`.
"""

import math
from collections.abc import Callable

import torch
from nflows.transforms.base import Transform
from torch import Tensor, nn

from p4flows.arguments import check_rows
from p4flows.matrices import PerturbedMatrix
from p4flows.transforms import (
    AffineCoupling,
    BentIdentity,
    BentStack,
    ColumnsTransform,
    P4InvTransform,
    P4OneByOneConvolution,
    P4OrthogonalTransform,
    SplineCoupling,
)
from p4flows.transforms.bent_cascade import DENSE_UP_TO


class Pixels(Transform):
    """A transform of images as one of rows, so that the same is asked of it."""

    def __init__(self, transform: Transform, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.transform, self.shape = transform, shape
        self.features = math.prod(shape)

    def extra_repr(self) -> str:
        return f"features={self.features}"

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_rows(inputs, self.features)
        outputs, logabsdet = self.transform(inputs.reshape(-1, *self.shape), context)
        return outputs.reshape(inputs.shape), logabsdet

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_rows(inputs, self.features)
        outputs, logabsdet = self.transform.inverse(inputs.reshape(-1, *self.shape), context)
        return outputs.reshape(inputs.shape), logabsdet


class AtContext(Transform):
    """A conditional transform of rows at one context, so that the same is asked of it."""

    context: Tensor

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform, self.features = transform, transform.features
        self.register_buffer("context", torch.linspace(-1.0, 0.5, transform.context_features))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform(inputs, self.context.expand(len(inputs), -1))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(inputs, self.context.expand(len(inputs), -1))


Constructor = Callable[[], Transform]

PAPER = {"rank": 1, "perturbation": "additive"}

CONSTRUCTORS: dict[str, Constructor] = {
    "AffineCoupling": lambda: AffineCoupling(3, hidden=(5,)),
    "AffineCoupling-context": lambda: AtContext(AffineCoupling(4, (5, 5), context_features=2)),
    "BentIdentity": BentIdentity,
    "BentStack": lambda: BentStack(2, blocks=2),
    "BentStack-paper": lambda: BentStack(2, blocks=2, **PAPER),
    "BentStack-one": lambda: BentStack(1, blocks=1),
    "BentStack-rank2": lambda: BentStack(3, blocks=3, rank=2),
    "BentStack-thin": lambda: BentStack(DENSE_UP_TO + 1, blocks=1, rank=2),
    "ColumnsTransform": lambda: ColumnsTransform(4, [3, 0, 2], P4InvTransform(3)),
    "P4InvTransform": lambda: P4InvTransform(3),
    "P4InvTransform-paper": lambda: P4InvTransform(3, **PAPER),
    "P4InvTransform-cache": lambda: P4InvTransform(3, using_cache=True),
    "P4InvTransform-nobias": lambda: P4InvTransform(3, bias=False),
    "P4InvTransform-one": lambda: P4InvTransform(1),
    "P4InvTransform-rank2": lambda: P4InvTransform(4, rank=2),
    "P4InvTransform-rank2-additive": lambda: P4InvTransform(4, rank=2, perturbation="additive"),
    "P4InvTransform-reverse": lambda: P4InvTransform(3, init="reverse"),
    "P4OneByOneConvolution": lambda: Pixels(P4OneByOneConvolution(3), (3, 2, 1)),
    "P4OneByOneConvolution-cache": lambda: Pixels(
        P4OneByOneConvolution(3, using_cache=True), (3, 1, 2)
    ),
    "P4OrthogonalTransform": lambda: P4OrthogonalTransform(3),
    "P4OrthogonalTransform-cache": lambda: P4OrthogonalTransform(3, using_cache=True),
    "P4OrthogonalTransform-rank2": lambda: P4OrthogonalTransform(4, rank=2),
    "SplineCoupling": lambda: SplineCoupling(4, [1, 2], hidden=(5, 5), bins=4),
    "SplineCoupling-context": lambda: AtContext(
        SplineCoupling(4, [1, 2], circular=[2], hidden=(5, 5), bins=4, context_features=2)
    ),
    "SplineCoupling-torus": lambda: SplineCoupling(2, [1], circular=[0, 1], hidden=(5,), bins=3),
}

FREE_WIDTH = 3  # of the inputs of a transform without a fixed number of features


def width(transform: Transform) -> int:
    """The number of features to test a transform with."""
    return getattr(transform, "features", FREE_WIDTH)


@torch.no_grad()
def perturb(module: nn.Module) -> None:
    """Random parameters everywhere: u and v of every perturbed matrix, biases, nets."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    for matrix in perturbed_matrices(module):
        matrix.u.normal_(std=0.5 * matrix.size**-0.5)


def move(module: nn.Module, merges: int = 3) -> None:
    """Take a module off its start: several merges, then a perturbation that is not merged."""
    for _ in range(merges):
        perturb(module)
        for matrix in perturbed_matrices(module):
            assert bool(matrix.merge(force=True).all())
    perturb(module)


def perturbed_matrices(module: nn.Module) -> list[PerturbedMatrix]:
    """All perturbed matrices of a module, at any depth."""
    return [found for found in module.modules() if isinstance(found, PerturbedMatrix)]
