"""What a benchmark writes beside its numbers: where they were measured, tables, a log-log plot."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import experiment
from experiment import cells, table

__all__ = ["cells", "fitted_exponent", "measured", "plot", "table", "write"]


def write(stem: Path, records: list[dict[str, Any]], parts: list[str]) -> None:
    """STEM.json and STEM.md, whose first line says where it was measured; printed as well."""
    content = {"environment": experiment.environment(), "records": records}
    experiment.write(stem.with_suffix(".json"), json.dumps(content, indent=2))
    experiment.publish(stem.with_suffix(".md"), [content], *parts)


def measured() -> str:
    """Where the numbers of this call come from, as a line."""
    return experiment.provenance([{"environment": experiment.environment()}])


def fitted_exponent(points: dict[int, float]) -> float:
    """p of the least-squares fit seconds ∝ sizeᵖ."""
    x = torch.tensor([math.log(size) for size in points], dtype=torch.float64)
    y = torch.tensor([math.log(seconds) for seconds in points.values()], dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (x @ x)).item()


def plot(file: Path, curves: dict[str, dict[int, float]], x_label: str, fit_from: int) -> None:
    """Seconds against size, both logarithmic, with the exponent of the sizes from `fit_from` on."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, points in curves.items():
        tail = {size: seconds for size, seconds in points.items() if size >= fit_from}
        label = f"{name}, exponent {fitted_exponent(tail):.2f}" if len(tail) > 1 else name
        style = "k--" if "bare" in name else "o-"
        axes.loglog(list(points), list(points.values()), style, label=label, markersize=4)
    axes.set(xlabel=x_label, ylabel="seconds")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
