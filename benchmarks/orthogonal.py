"""A training step of orthogonal layers: p4flows, torch's parametrisations and geotorch.

    python benchmarks/orthogonal.py --sizes 128 512 1024

A step is forward, loss, backward (into the inputs too) and Adam. Of p4flows it holds its share of
a merge (every 100 steps) and of a correction (every 50 merges) as well. geotorch takes part where
it is importable.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from timing import interleaved
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import p4flows
from p4flows import P4OrthogonalTransform
from p4flows.matrices import PerturbedMatrix

BATCH, EVERY, CORRECT_EVERY = 256, 100, 50


class Rows(nn.Module):
    """An nflows layer as a map of rows alone."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, inputs: Tensor) -> Tensor:
        return self.transform(inputs)[0]


def layers(size: int) -> dict[str, nn.Module]:
    """Every contestant at one size, ours first."""
    found: dict[str, nn.Module] = {
        "P4OrthogonalTransform": Rows(P4OrthogonalTransform(size)),
        "P4OrthogonalTransform, rank 8": Rows(P4OrthogonalTransform(size, rank=8)),
        "p4flows.orthogonal(nn.Linear)": p4flows.orthogonal(nn.Linear(size, size)),
    }
    for name in ("matrix_exp", "cayley", "householder"):
        linear = nn.Linear(size, size)
        found[f"torch orthogonal, {name}"] = parametrizations.orthogonal(
            linear, orthogonal_map=name
        )
    if importlib.util.find_spec("geotorch"):
        import geotorch

        for name in ("expm", "cayley"):
            linear = nn.Linear(size, size)
            geotorch.orthogonal(linear, "weight", triv=name)
            found[f"geotorch orthogonal, {name}"] = linear
    found["nn.Linear (not orthogonal)"] = nn.Linear(size, size)
    return found


def training_step(layer: nn.Module, size: int) -> Callable[[], None]:
    """One step of Adam on a batch, without merges."""
    optimizer = torch.optim.Adam(layer.parameters())
    x, target = torch.randn(BATCH, size, requires_grad=True), torch.randn(BATCH, size)

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        (layer(x) - target).square().mean().backward()
        optimizer.step()

    return step


def upkeep(layer: nn.Module) -> dict[str, Callable[[], Any]]:
    """What a `MergeHook` adds now and then, by how many steps share one."""
    matrices = [found for found in layer.modules() if isinstance(found, PerturbedMatrix)]
    return {
        name: action
        for matrix in matrices
        for name, action in (("merge", matrix.merge), ("correct", matrix.correct))
    }


def measure(size: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a step of every contestant, on the clock of the processor."""
    torch.manual_seed(0)
    contestants: dict[str, Callable[[], Any]] = {}
    found = layers(size)
    for name, layer in found.items():
        contestants[name] = training_step(layer, size)
        contestants |= {f"{name}: {part}": action for part, action in upkeep(layer).items()}
    timings = interleaved(contestants, rounds=rounds, title=f"n={size}", clock=time.process_time)
    records = []
    for name in found:
        step = timings[name].median
        parts = {
            part: timings[f"{name}: {part}"].median
            for part in ("merge", "correct")
            if f"{name}: {part}" in timings
        }
        amortised = parts.get("merge", 0.0) / EVERY
        amortised += parts.get("correct", 0.0) / (EVERY * CORRECT_EVERY)
        records.append({"size": size, "layer": name, "seconds": step + amortised, **parts})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = [r for size in arguments.sizes for r in measure(size, arguments.rounds)]
    rows = []
    for name in dict.fromkeys(record["layer"] for record in records):
        seconds = [record["seconds"] for record in records if record["layer"] == name]
        rows.append([name, *(f"{1e3 * s:.2f}" for s in seconds)])
    header = ["ms per training step, batch 256", *(f"n = {size}" for size in arguments.sizes)]
    report.write(arguments.output / "orthogonal", records, [report.table(header, rows)])


if __name__ == "__main__":
    main()
