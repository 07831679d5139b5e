"""Speed and memory of one invertible linear layer, against other libraries' and its limit.

    python benchmarks/layers.py

All layers are timed round robin in one run. A training step is forward pass, negative
log-likelihood, backward pass down to the inputs and Adam; that of a P4 layer is charged with a
merge every 50 steps and a correction every 2,500. The limit is two bare products of that size,
x Aᵀ and g A. Libraries that cannot be imported are left out with a note.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contestants import (
    CONTESTANTS,
    LINEAR,
    P4INV,
    P4INV_PAPER,
    entering,
    missing,
    training_step,
)
from report import plot, table, write
from timing import CLOCKS, Timing, interleaved
from torch import Tensor, nn

from p4flows import MergeHook, P4InvTransform

SIZES = [4, 8, 16, 32, 60, 128, 256, 512, 1024]
EVERY, CORRECT_EVERY = 50, 50
OURS = (P4INV, P4INV_PAPER)
LIMIT = "two bare products"
# Small layers are dispatch, whatever n: the exponent is read off where the products dominate.
FIT_FROM = 256
QUANTITIES = ["step, forward", "step, inverse", "forward", "inverse", "merge", "correction"]


def built(name: str, size: int) -> nn.Module:
    """A contestant off its initial value where the initial value would hide a cost."""
    layer = CONTESTANTS[name].build(size)
    if isinstance(layer, P4InvTransform):
        with torch.no_grad():
            layer.matrix.u.normal_(std=0.1 / size)
    return layer


def merging(layer: P4InvTransform) -> Callable[[], Any]:
    """A merge as the hook does it, optimizer state included: a step of Adam without gradients."""
    optimizer = torch.optim.Adam(layer.parameters())
    paper = layer.matrix.perturbation == "additive"
    hook = MergeHook(layer, optimizer, correct_every=None, paper=paper)
    layer.matrix.u.grad = torch.zeros_like(layer.matrix.u)
    optimizer.step()

    def run(kept: Any = (layer, optimizer)) -> None:
        hook.merge()

    return run


def inference(layer: nn.Module, direction: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    """A pass in eval mode without gradients."""
    layer.eval()

    def run() -> Any:
        with torch.no_grad():
            return direction(x)

    return run


def candidates(
    quantity: str, size: int, x: Tensor, chosen: list[str]
) -> dict[str, Callable[[], Any]]:
    """What is timed side by side for one quantity."""
    runs: dict[str, Callable[[], Any]] = {}
    if quantity in ("merge", "correction"):
        for name in OURS:
            layer = built(name, size)
            runs[name] = merging(layer) if quantity == "merge" else layer.matrix.correct
        return runs
    for name, contestant in entering(size).items():
        if chosen and name not in (P4INV, *chosen):
            continue
        if "inverse" in quantity and not contestant.invertible:
            continue
        layer = built(name, size)
        direction = layer.inverse if "inverse" in quantity else layer.forward
        if quantity.startswith("step"):
            runs[name] = training_step(layer, x, direction)
            continue
        runs[name] = inference(layer, direction, x)
        if hasattr(layer, "use_cache") and name.startswith(P4INV):
            cached = built(name, size)
            cached.use_cache()
            direction = cached.inverse if "inverse" in quantity else cached.forward
            runs[f"{name}, cached"] = inference(cached, direction, x)
    if quantity.startswith("step"):
        a, g = torch.randn(size, size), torch.randn_like(x)
        runs[LIMIT] = lambda: (x @ a.mT, g @ a)
    return runs


def measure(
    sizes: list[int], batch: int, rounds: int, clock: Callable[[], float], chosen: list[str]
) -> list[dict[str, Any]]:
    """Seconds of every quantity, contestant and size; merges are charged to the steps."""
    records = []
    for size in sizes:
        torch.manual_seed(0)
        x = torch.randn(batch, size)
        timings: dict[str, dict[str, Timing]] = {}
        for quantity in QUANTITIES:
            runs = candidates(quantity, size, x, chosen)
            title = f"n = {size}, {quantity}"
            timings[quantity] = interleaved(runs, rounds=rounds, title=title, clock=clock)
        extra = {
            name: timings["merge"][name].median / EVERY
            + timings["correction"][name].median / (EVERY * CORRECT_EVERY)
            for name in OURS
        }
        for quantity, row in timings.items():
            for name, timing in row.items():
                charged = extra.get(name, 0.0) if quantity.startswith("step") else 0.0
                records.append(
                    {
                        "quantity": quantity,
                        "contestant": name,
                        "n": size,
                        "seconds": timing.median + charged,
                        "low": timing.low + charged,
                        "high": timing.high + charged,
                    }
                )
    return records


def memory(size: int, batch: int) -> list[dict[str, Any]]:
    """Memory of every contestant at one size, each in a process of its own."""
    script = Path(__file__).with_name("memory.py")
    records = []
    for name in entering(size):
        command = [sys.executable, script, "--contestant", name, "--size", size, "--batch", batch]
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=True
        )
        records.append({"contestant": name, "n": size, **json.loads(done.stdout)})
    return records


def duration(seconds: float) -> str:
    """Three digits in µs or ms."""
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def quantity_table(records: list[dict[str, Any]], quantity: str, sizes: list[int]) -> str:
    """Medians with quartiles, and in brackets the ratio of P4InvTransform to this layer."""
    chosen = {(r["contestant"], r["n"]): r for r in records if r["quantity"] == quantity}
    rows = []
    for name in dict.fromkeys(name for name, _ in chosen):
        row = [name]
        for size in sizes:
            record = chosen.get((name, size))
            if record is None:
                row.append("–")
                continue
            spread = (record["high"] - record["low"]) / record["seconds"] / 2
            ratio = chosen[P4INV, size]["seconds"] / record["seconds"]
            row.append(f"{duration(record['seconds'])} ± {spread:.0%} ({ratio:.2f})")
        rows.append(row)
    return table([quantity, *(f"n = {size}" for size in sizes)], rows)


def memory_table(records: list[dict[str, Any]]) -> str:
    """MiB, and in brackets the ratio of P4InvTransform to this layer."""
    ours = next(r for r in records if r["contestant"] == P4INV)
    rows = []
    for record in records:
        row = [record["contestant"]]
        for key in ("held", "peak", "peak_of_correction"):
            if key not in record:
                row.append("–")
                continue
            ratio = ours[key] / record[key] if record[key] > 0 else float("nan")
            row.append(f"{record[key]:.1f} ({ratio:.2f})")
        rows.append(row)
    header = [f"MiB at n = {ours['n']}", "held", "peak of steps and merges", "peak of correction"]
    return table(header, rows)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--contestants", nargs="+", default=[], help="beside P4InvTransform; all by default"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu on a busy machine, one thread"
    )
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="at the largest n"
    )
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    return parser.parse_args()


def main() -> None:
    """Time, weigh, and write Markdown, JSON and a plot."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    for library in sorted(missing()):
        print(f"{library} is not importable: left out")
    clock = CLOCKS[arguments.clock]
    records = measure(
        arguments.sizes, arguments.batch, arguments.rounds, clock, arguments.contestants
    )
    weights = memory(max(arguments.sizes), arguments.batch) if arguments.memory else []
    parts = [quantity_table(records, quantity, arguments.sizes) for quantity in QUANTITIES]
    if weights:
        parts.append(memory_table(weights))
    stem = arguments.output / f"layers-{arguments.threads}-threads"
    write(stem, records + weights, parts)
    curves: dict[str, dict[int, float]] = {}
    for record in records:
        if record["quantity"] == "step, forward":
            curves.setdefault(record["contestant"], {})[record["n"]] = record["seconds"]
    shown = [P4INV, LIMIT, LINEAR, "nflows LULinear", "nflows NaiveLinear"]
    plot(
        stem.with_suffix(".png"),
        {name: curves[name] for name in shown if name in curves},
        f"n, training step at batch {arguments.batch}",
        FIT_FROM,
    )


if __name__ == "__main__":
    main()
