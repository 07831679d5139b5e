"""Speed of the fused Bent stack: against single layers, with blocks and batch, and its crossover.

    python benchmarks/stack.py

A training step is forward pass, negative log-likelihood, backward pass and Adam; a merge of all
matrices every 10 steps, as in the paper's Appendix G, is charged to it.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from contestants import training_step
from report import fitted_exponent, table, write
from timing import CLOCKS, Timing, interleaved

from p4flows import BentStack, MergeHook
from p4flows.transforms import bent_cascade

EVERY = 10
# `interleaved` with the number of rounds and the clock of this run.
Measure = Callable[..., dict[str, Timing]]


def off_identity(features: int, blocks: int) -> BentStack:
    """A stack whose matrices are perturbed."""
    stack = BentStack(features, blocks, rank=1, perturbation="additive")
    with torch.no_grad():
        stack.matrix.u.normal_(std=0.1 / features)
    return stack


def merging(module: torch.nn.Module) -> Callable[[], Any]:
    """A merge as the hook does it, optimizer state included: a step of Adam without gradients."""
    optimizer = torch.optim.Adam(module.parameters())
    MergeHook(module, optimizer, every=1, correct_every=None)
    return optimizer.step


@contextmanager
def dense_up_to(size: int) -> Iterator[None]:
    """Another crossover between a dense Ã and the two thin products."""
    with mock.patch.object(bent_cascade, "DENSE_UP_TO", size):
        yield


def fused_and_unfused(blocks: int, batch: int, measure: Measure) -> list[list[str]]:
    """Rows of a table: the two-dimensional stack as one layer and as single layers."""
    stack = off_identity(2, blocks)
    modules = {"fused": stack, "unfused": stack.to_composite()}
    x = torch.randn(batch, 2)
    runs: dict[str, Callable[[], Any]] = {}
    for name, module in modules.items():
        runs[f"{name}, step"] = training_step(module, x, module.forward)
        runs[f"{name}, step, inverse"] = training_step(module, x, module.inverse)
        runs[f"{name}, merge"] = merging(module)
    timings = measure(runs, title="fused against unfused")
    rows = []
    for step in ("step", "step, inverse"):
        total = {
            name: timings[f"{name}, {step}"].median + timings[f"{name}, merge"].median / EVERY
            for name in modules
        }
        ratio = total["unfused"] / total["fused"]
        rows.append([step, *(f"{total[name] * 1e3:.2f} ms" for name in modules), f"{ratio:.1f}"])
    merge = [timings[f"{name}, merge"].median for name in modules]
    rows.append(["merge", *(f"{t * 1e3:.2f} ms" for t in merge), f"{merge[1] / merge[0]:.1f}"])
    return rows


def steps(
    stacks: dict[int, tuple[BentStack, int]], measure: Measure, title: str
) -> dict[int, Timing]:
    """Training steps of several (stack, batch) side by side."""
    runs = {
        str(key): training_step(stack, torch.randn(batch, stack.features), stack.forward)
        for key, (stack, batch) in stacks.items()
    }
    timings = measure(runs, title=title)
    return {key: timings[str(key)] for key in stacks}


def crossover(sizes: list[int], batch: int, measure: Measure) -> list[list[str]]:
    """Rows of a table: a step through a dense Ã and through two thin products, by n."""
    rows = []
    for size in sizes:
        stack = off_identity(size, blocks=4)
        step = training_step(stack, torch.randn(batch, size), stack.forward)

        def dense(step: Callable[[], None] = step, size: int = size) -> None:
            with dense_up_to(size):
                step()

        def thin(step: Callable[[], None] = step) -> None:
            with dense_up_to(0):
                step()

        row = measure({"dense": dense, "thin": thin}, title=f"n = {size}")
        d, t = row["dense"].median, row["thin"].median
        rows.append([str(size), f"{d * 1e3:.2f} ms", f"{t * 1e3:.2f} ms", f"{d / t:.2f}"])
    return rows


def timing_rows(timings: dict[int, Timing]) -> list[list[str]]:
    return [
        [str(key), f"{t.median * 1e3:.2f} ms", f"{t.low * 1e3:.2f}–{t.high * 1e3:.2f}"]
        for key, t in timings.items()
    ]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--batches", type=int, nargs="+", default=[10, 100, 200, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="at n = 2 more do not help")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu on a busy machine, one thread"
    )
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    return parser.parse_args()


def main() -> None:
    """Time, and write Markdown and JSON."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = CLOCKS[arguments.clock]
    measure = functools.partial(interleaved, rounds=arguments.rounds, clock=clock)
    most = min(100, max(arguments.blocks))
    comparison = fused_and_unfused(most, 200, measure)
    by_blocks = steps({b: (off_identity(2, b), 200) for b in arguments.blocks}, measure, "blocks")
    by_batch = steps({n: (off_identity(2, most), n) for n in arguments.batches}, measure, "batch")
    by_size = crossover(arguments.sizes, 200, measure)
    parts = [
        table([f"n = 2, {most} blocks, batch 200", "fused", "unfused", "ratio"], comparison),
        table(["blocks (n = 2, batch 200)", "step", "quartiles"], timing_rows(by_blocks)),
        table([f"batch (n = 2, {most} blocks)", "step", "quartiles"], timing_rows(by_batch)),
        table(["n (4 blocks, batch 200)", "dense", "thin", "ratio"], by_size),
    ]
    if len(by_blocks) > 1:
        exponent = fitted_exponent({b: t.median for b, t in by_blocks.items()})
        parts.insert(2, f"Fitted exponent in the number of blocks: {exponent:.2f}.")
    records = [
        {"quantity": quantity, "at": key, "seconds": t.median, "low": t.low, "high": t.high}
        for quantity, timings in (("blocks", by_blocks), ("batch", by_batch))
        for key, t in timings.items()
    ]
    records += [{"quantity": "fused against unfused", "row": row} for row in comparison]
    records += [{"quantity": "dense against thin", "row": row} for row in by_size]
    write(arguments.output / "stack", records, parts)


if __name__ == "__main__":
    main()
