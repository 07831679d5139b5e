"""Which steps of iterative inversion repair an inverse best: the table of docs/correction.md."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from p4flows.linalg import refine_inverse, residual

STEPS = ((2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3), (7, 1), (7, 2), (7, 3))
STARTS = (1e-3, 1e-2, 1e-1)
SIZE = 256
PRODUCTS = {2: 2, 3: 3, 7: 5}  # matrix products of a step, that in the residual included


def problem(start: float, seed: int) -> tuple[Tensor, Tensor]:
    """A and an inverse with ‖A X − I‖ = `start`, float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)

    a = (torch.eye(SIZE) + 0.3 * SIZE**-0.5 * normal()).float()
    error = normal()
    error *= start / torch.linalg.matrix_norm(error)
    x = torch.linalg.inv(a.double()) @ (torch.eye(SIZE) - error)
    return a, x.float()


def largest(a: Tensor, x: Tensor) -> float:
    return (a.double() @ x.double() - torch.eye(SIZE)).abs().max().item()


def correct(a: Tensor, x: Tensor, order: int, steps: int) -> Tensor:
    for _ in range(steps):
        x = refine_inverse(x, residual(a, x), order)
    return x


def milliseconds(order: int, steps: int, repeats: int) -> float:
    a, x = problem(STARTS[0], 0)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        correct(a, x, order, steps)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=5, help="matrices for each entry")
    parser.add_argument("--json", type=Path, help="file that takes the numbers as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problems = {
        start: [problem(start, seed) for seed in range(arguments.draws)] for start in STARTS
    }
    by_lu = statistics.median(
        largest(a, torch.linalg.inv(a.double()).float()) for a, _ in problems[STARTS[0]]
    )
    rows = []
    for order, steps in STEPS:
        reached = {
            f"{start:.0e}": statistics.median(
                largest(a, correct(a, x, order, steps)) for a, x in problems[start]
            )
            for start in STARTS
        }
        cost = {"products": PRODUCTS[order] * steps, "ms": milliseconds(order, steps, 20)}
        rows.append({"order": order, "steps": steps, **cost, **reached})

    starts = [f"{start:.0e}" for start in STARTS]
    print("| order | steps | products | ms | " + " | ".join(f"from {s}" for s in starts), "|")
    print("|---:|" + "---:|" * (3 + len(starts)))
    for entry in rows:
        cells = " | ".join(f"{entry[start]:.1e}" for start in starts)
        cost = f"{entry['products']} | {entry['ms']:.1f}"
        print(f"| {entry['order']} | {entry['steps']} | {cost} | {cells} |")
    about = {"n": SIZE, "dtype": "float32", "torch": torch.__version__, "LU": f"{by_lu:.1e}"}
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()) + ", one thread.")
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
