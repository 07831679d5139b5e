"""A flow of P4Inv layers and affine couplings learns what patches of photographs look like.

    python examples/image_patches.py --preset quick
    python examples/image_patches.py --preset long

The data are patches of 8 × 8 pixels, points in 63 dimensions. A flow maps them to noise; run
backwards, it makes noise into new patches. The script trains one, prints its likelihood beside that
of a Gaussian and draws samples and what the first layer has learned. An interrupted run continues;
--figures only draws.
"""

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from experiment import Record, cells, command_line, kept, publish, table, there
from nflows.distributions import StandardNormal
from nflows.flows.base import Flow
from nflows.transforms import CompositeTransform, Transform
from photographs import Photographs
from torch import Tensor

from p4flows import P4InvTransform
from p4flows.lightning import fit
from p4flows.transforms import AffineCoupling

SIZE = 8
BATCH = 256
HELD_OUT = 10_000
GRID = 8


@dataclasses.dataclass(frozen=True)
class Preset:
    """Depth of the flow and length of its training."""

    couplings: int
    steps: int
    hidden: tuple[int, ...] = (64, 64)
    learning_rate: float = 5e-3


PRESETS = {"quick": Preset(8, 3_000), "long": Preset(16, 20_000)}


def patch_flow(features: int, preset: Preset) -> Flow:
    """[P4Inv, coupling] × couplings, P4Inv: every linear layer is a free matrix.

    A coupling changes half of the features, looking at the other half; the matrices decide which
    combinations of pixels these halves are.
    """
    # From a random rotation, so that whatever the first layer looks like has been learned.
    rotation = torch.linalg.qr(torch.randn(features, features))[0]
    transforms: list[Transform] = [P4InvTransform(features, init=rotation)]
    for _ in range(preset.couplings):
        transforms.append(AffineCoupling(features, preset.hidden))
        # From the reverse permutation, so that the next coupling sees the other half.
        transforms.append(P4InvTransform(features, init="reverse"))
    return Flow(CompositeTransform(transforms), StandardNormal([features]))


def train(
    photographs: Photographs, preset: Preset, seed: int, checkpoint: Path, progress: bool
) -> tuple[Flow, dict[str, Any]]:
    """The trained flow and what its training took."""
    torch.manual_seed(seed)
    flow = patch_flow(photographs.features, preset)
    flow, result = fit(
        flow,
        lambda generator: photographs.draw(BATCH, generator),
        max_steps=preset.steps,
        learning_rate=preset.learning_rate,
        checkpoint=checkpoint,
        seed=seed,
        progress=progress,
    )
    record = {
        "steps": preset.steps,
        "seconds": round(result.seconds, 1),
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "merges": result.merges,
    }
    return flow, record


@torch.no_grad()
def evaluate(flow: Flow, photographs: Photographs) -> dict[str, float]:
    """Nats a patch on held-out parts of the photographs, and those of a Gaussian."""
    generator = torch.Generator().manual_seed(1)
    seen = photographs.draw(5 * HELD_OUT, generator)
    held_out = photographs.draw(HELD_OUT, generator, held_out=True)
    gaussian = torch.distributions.MultivariateNormal(seen.mean(0), torch.cov(seen.T))
    noise, _ = flow._transform(held_out)
    back, _ = flow._transform.inverse(noise)
    return {
        "nll_nats": -flow.log_prob(held_out).mean().item(),
        "gaussian_nll_nats": -gaussian.log_prob(held_out).mean().item(),
        "round_trip_error": (back - held_out).abs().max().item(),
    }


def first_layer(flow: Flow) -> P4InvTransform:
    return next(module for module in flow.modules() if isinstance(module, P4InvTransform))


@torch.no_grad()
def panels(flow: Flow, photographs: Photographs, seed: int) -> dict[str, np.ndarray]:
    """Patches, samples, and the rows and columns of the first layer, all as pictures."""
    patches = photographs.draw(GRID**2, torch.Generator().manual_seed(2), held_out=True)
    torch.manual_seed(seed)
    layer = first_layer(flow)
    # Brightness by the standard deviation of all pixels of the photographs, for both alike.
    brightness = 3 * photographs.scale.mean()
    # What the layer multiplies a patch by, and what it adds up to make one: the columns of the
    # inverse, which a P4Inv layer has at hand.
    images = {
        "photographs": photographs.pictures(patches) / brightness,
        "samples of the flow": photographs.pictures(flow.sample(GRID**2)) / brightness,
        "filters: rows of W": stretched(photographs.filters(layer.weight())),
        "features: columns of W⁻¹": stretched(photographs.pictures(layer.weight_inverse().T)),
    }
    return {title: tiles(image).numpy() for title, image in images.items()}


def figure(shown: dict[str, np.ndarray]) -> Any:
    """The panels side by side."""
    drawn, axes = plt.subplots(1, len(shown), figsize=(16, 4.4), layout="constrained")
    for axis, (title, image) in zip(axes, shown.items(), strict=True):
        axis.imshow(image, cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
    return drawn


def stretched(images: Tensor) -> Tensor:
    """Each image divided by its largest value, but for the last pixel, the sum of the others."""
    largest = images.abs().flatten(1)[:, :-1].amax(1)
    return images / largest[:, None, None]


def tiles(images: Tensor) -> Tensor:
    """The first GRID² images, each of SIZE × SIZE pixels, in a square with white lines between."""
    step = SIZE + 1
    square = torch.full((GRID * step + 1, GRID * step + 1), torch.nan)
    for index, image in enumerate(images[: GRID**2]):
        top, left = (step * place + 1 for place in divmod(index, GRID))
        square[top : top + SIZE, left : left + SIZE] = image
    return square


def run(preset_name: str, seed: int, file: Path) -> Record:
    """Train, evaluate, and keep the panels of the figure beside the record."""
    photographs = Photographs(SIZE)
    preset = PRESETS[preset_name]
    flow, record = train(photographs, preset, seed, file.with_suffix(""), True)
    np.savez(file.with_suffix(".npz"), **panels(flow, photographs, seed))
    return {"preset": preset_name, "seed": seed, **record, **evaluate(flow, photographs)}


COLUMNS = {
    "flow": lambda r: f"{r['preset']}, {r['parameters']} parameters",
    "steps": lambda r: str(r["steps"]),
    "NLL (nats a patch)": lambda r: f"{r['nll_nats']:.2f}",
    "a Gaussian's": lambda r: f"{r['gaussian_nll_nats']:.2f}",
    "round trip": lambda r: f"{r['round_trip_error']:.0e}",
    "merges": lambda r: str(r["merges"]["merged"]),
    "seconds": lambda r: f"{r['seconds']:.0f}",
}


def main() -> None:
    """Train, then write figure and numbers."""
    parser = command_line(__doc__, "results/image_patches", PRESETS, pool=False)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    preset, seed = arguments.preset, arguments.seed
    file = arguments.output / f"image_patches-{preset}-{seed}.json"
    if not arguments.figures:
        kept(file, lambda: run(preset, seed, file))
    record = there([file], beside=".npz")[file]
    figure(dict(np.load(file.with_suffix(".npz")))).savefig(file.with_suffix(".png"), dpi=100)
    publish(file.with_suffix(".md"), [record], table(list(COLUMNS), [cells(record, COLUMNS)]))
    print(f"figure: {file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
