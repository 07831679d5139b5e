"""What learning.py trains on: patches of photographs, mixed sources, a molecule, MNIST."""

import dataclasses
import gzip
import math
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from nflows.distributions import StandardNormal
from nflows.flows.base import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import AffineCouplingTransform, CompositeTransform, Transform
from photographs import Photographs
from torch import Tensor, nn
from torch.nn.functional import softplus

COUPLINGS, HIDDEN = 8, 64
# Condition number of the mixing matrix of ICA, and the seed it is drawn from.
CONDITION, MIXING_SEED = 100.0, 0
HELD_OUT_SEED = 1_000_003

Layer = Callable[[int], Transform]


@dataclasses.dataclass(frozen=True)
class Task:
    """Data and the flow that a layer is a part of.

    Attributes:
        features: n.
        batch: a function of (rows, generator) that draws training data.
        held_out: test data, shape (rows, n).
        flow: the model around a contestant's layer, with `log_prob`.
        quantity: what is reported.
        offset, per: it is (NLL + offset) / per.
    """

    features: int
    batch: Callable[[int, torch.Generator], Tensor]
    held_out: Tensor
    flow: Callable[[Layer], nn.Module]
    quantity: str = "test NLL (nats)"
    offset: float = 0.0
    per: float = 1.0


def held_out_rows(features: int) -> int:
    """Fewer where an evaluation would take as long as the training."""
    return 10_000 if features < 512 else 2_000


def coupling_flow(features: int, layer: Layer) -> nn.Module:
    """Affine couplings, behind each the contestant's layer."""
    half = features // 2
    transforms: list[Transform] = []
    for _ in range(COUPLINGS):
        coupling = AffineCouplingTransform(
            [0] * half + [1] * (features - half),
            lambda inputs, outputs: ResidualNet(inputs, outputs, HIDDEN, num_blocks=1),
        )
        transforms += [coupling, layer(features)]
    return Flow(CompositeTransform(transforms), StandardNormal([features]))


class LogisticSources(nn.Module):
    """One linear layer and independent standard logistic sources: maximum-likelihood ICA."""

    def __init__(self, layer: Transform) -> None:
        super().__init__()
        self.layer = layer

    def log_prob(self, inputs: Tensor) -> Tensor:
        sources, logabsdet = self.layer(inputs)
        return logistic_log_density(sources) + logabsdet


def logistic_log_density(sources: Tensor) -> Tensor:
    """ln of the product of standard logistic densities."""
    size = sources.abs()
    return -(size + 2 * softplus(-size)).sum(-1)


def patches(size: int, files: list[Path] | None = None) -> Task:
    """Patches of photographs, n = size² − 1, and a flow of affine couplings."""
    photographs = Photographs(size, files)
    features = photographs.features
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    return Task(
        features,
        photographs.draw,
        photographs.draw(held_out_rows(features), generator, held_out=True),
        lambda layer: coupling_flow(features, layer),
    )


def mixing_matrix(features: int) -> Tensor:
    """Singular values from 1/√κ to √κ in equal ratios between random rotations, float64."""
    generator = torch.Generator().manual_seed(MIXING_SEED)
    left, right = (
        torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))[
            0
        ]
        for _ in range(2)
    )
    exponents = torch.linspace(-0.5, 0.5, features, dtype=torch.float64)
    return (left * CONDITION**exponents) @ right


def ica(features: int) -> Task:
    """x = M s with logistic s; what is reported is the excess over the true unmixing."""
    mixing = mixing_matrix(features)

    single = mixing.float()

    def draw(rows: int, generator: torch.Generator) -> Tensor:
        # In float64, where a uniform number is never 0 and its logit never infinite.
        uniform = torch.rand(rows, features, generator=generator, dtype=torch.float64)
        return uniform.logit()

    sources = draw(held_out_rows(features), torch.Generator().manual_seed(HELD_OUT_SEED))
    optimum = torch.linalg.slogdet(mixing).logabsdet - logistic_log_density(sources).mean()
    return Task(
        features,
        lambda rows, generator: draw(rows, generator).float() @ single.T,
        (sources @ mixing.T).float(),
        lambda layer: LogisticSources(layer(features)),
        "excess over the optimum (nats a dimension)",
        -optimum.item(),
        features,
    )


def rows_of(data: Tensor) -> Callable[[int, torch.Generator], Tensor]:
    """Batches of a fixed set of training data."""
    return lambda rows, generator: data[torch.randint(len(data), (rows,), generator=generator)]


def molecule(output: Path, preset: str = "quick") -> Task:
    """The mixed coordinates of alanine dipeptide; its trajectory is simulated once and kept."""
    from alanine_dipeptide import PRESETS, Problem

    problem = Problem(PRESETS[preset], output, 1, progress=True)
    frames = problem.replicas[-1][problem.trans[-1]]
    features = problem.features.shape[1]
    held_out = problem.coordinates(frames)[0][:: max(1, len(frames) // held_out_rows(features))]
    return Task(
        features,
        rows_of(problem.features),
        held_out,
        lambda layer: coupling_flow(features, layer),
    )


def read_idx(file: Path) -> Tensor:
    """The bytes of an IDX file, plain or compressed by gzip: uint8 of the shape in its header."""
    content = file.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
    if (zeros, kind) != (0, 8):
        raise ValueError(f"{file} is not an IDX file of unsigned bytes: it starts {content[:4]!r}")
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)


def mnist_images(directory: Path, part: str) -> Tensor:
    """The images of one part, "train" or "t10k", shape (images, pixels), uint8."""
    name = f"{part}-images-idx3-ubyte"
    for file in (directory / name, directory / f"{name}.gz"):
        if file.exists():
            return read_idx(file).flatten(1)
    raise FileNotFoundError(f"neither {name} nor {name}.gz in {directory}")


class SmoothLeakyRelu(Transform):
    """α x + (1 − α) ln(1 + eˣ), the activation of the published MNIST numbers."""

    ALPHA = 0.3

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = self.ALPHA * inputs + (1 - self.ALPHA) * softplus(inputs)
        slope = self.ALPHA + (1 - self.ALPHA) * torch.sigmoid(inputs)
        return outputs, slope.log().sum(-1)


def mnist(directory: Path) -> Task:
    """Two linear layers on MNIST from the user's files, as Keller et al. (2021) compare them.

    Grey values with uniform noise through a logit, a smooth leaky ReLU between the layers. The NLL
    is that of grey values from 0 to 256; published: exact gradient 947.6, relative gradient 1096.5.
    """
    train, test = (mnist_images(directory, part) for part in ("train", "t10k"))
    features, margin = train.shape[1], 1e-6

    def unit(images: Tensor, generator: torch.Generator) -> Tensor:
        grey = images + torch.rand(images.shape, generator=generator, dtype=torch.float64)
        return margin + (1 - 2 * margin) * grey / 256

    draw = rows_of(train)
    held_out = unit(test, torch.Generator().manual_seed(HELD_OUT_SEED))
    # Mean of ln|dz/dg| of z = logit(unit(g)): what the flow, which sees z, does not know of.
    slope = math.log((1 - 2 * margin) / 256) - (held_out * (1 - held_out)).log()
    return Task(
        features,
        lambda rows, generator: unit(draw(rows, generator), generator).logit().float(),
        held_out.logit().float(),
        lambda layer: Flow(
            CompositeTransform([layer(features), SmoothLeakyRelu(), layer(features)]),
            StandardNormal([features]),
        ),
        offset=-slope.sum(1).mean().item(),
    )


# By name, from the folder of the results and that of MNIST's files. The size is known beforehand,
# so that contestants can be chosen without the data.
SIZES = {
    "patches8": 63,
    "patches16": 255,
    "patches32": 1023,
    "ica64": 64,
    "ica256": 256,
    "ica1024": 1024,
    "molecule": 60,
    "mnist": 784,
}
TASKS: dict[str, Callable[[Path, Path | None], Task]] = {
    "patches8": lambda output, directory: patches(8),
    "patches16": lambda output, directory: patches(16),
    "patches32": lambda output, directory: patches(32),
    "ica64": lambda output, directory: ica(64),
    "ica256": lambda output, directory: ica(256),
    "ica1024": lambda output, directory: ica(1024),
    "molecule": lambda output, directory: molecule(output),
    "mnist": lambda output, directory: mnist(directory),
}
