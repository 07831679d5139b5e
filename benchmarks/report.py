"""What a benchmark writes beside its numbers: where they were measured, tables, a log-log plot."""

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch


def environment() -> dict[str, Any]:
    """Command, commit, torch, processor, threads, and the load that other processes made."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": described.stdout.strip(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def described(where: dict[str, Any]) -> str:
    """The environment as a paragraph."""
    return (
        f"`{where['command']}` at commit {where['commit']}: torch {where['torch']}, "
        f"{where['threads']} threads on {where['cores']} cores ({where['cpu']}), "
        f"load average {where['load_average']} at the end."
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(stem: Path, records: list[dict[str, Any]], where: dict[str, Any], text: str) -> None:
    """STEM.json and STEM.md; the text is printed as well."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": where, "records": records}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    stem.with_suffix(".md").write_text(text)
    print(text)


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
