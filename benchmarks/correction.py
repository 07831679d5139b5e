"""What repairs a stored inverse best, by condition: the table of docs/results/correction.md."""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import measured, table
from torch import Tensor

from p4flows.matrices.error import error_of_state
from p4flows.matrices.linear_algebra import residual

CONDITIONS = {
    torch.float32: (1e1, 1e2, 1e3, 1e4, 1e5, 1e6),
    torch.float64: (1e1, 1e2, 1e4, 1e6, 1e8, 1e10),
}


def refine_inverse(inverse: Tensor, error: Tensor, order: int) -> Tensor:
    """A step of the iterative inversion of Soleymani (2014), X·(I + R + … + R^(order−1)).

    The new residual is R^order, where R = I − A·X is the `error` of the old one.
    """
    if order == 2:
        return inverse + inverse @ error
    squared = error @ error
    if order == 3:
        return inverse + inverse @ (error + squared)
    tail = squared + squared @ squared
    tail.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return inverse + inverse @ ((error + squared) @ tail)


def iterate(order: int, steps: int, wide: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """Steps of one order, in the matrix's own dtype or in float64."""

    def correct(a: Tensor, x: Tensor) -> Tensor:
        dtype = a.dtype
        if wide:
            a, x = a.double(), x.double()
        for _ in range(steps):
            x = refine_inverse(x, residual(a, x), order)
        return x.to(dtype)

    return correct


def by_lu(a: Tensor, x: Tensor) -> Tensor:
    return torch.linalg.inv(a.double()).to(a.dtype)


METHODS = {
    "order 2, 3 steps": iterate(2, 3),
    "order 3, 2 steps": iterate(3, 2),
    "order 7, 1 step": iterate(7, 1),
    "order 3, 2 steps, float64": iterate(3, 2, wide=True),
    "LU, float64": by_lu,
}


def problem(size: int, condition: float, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """A of a given condition number and the inverse as it was stored, off by one part in 1e3."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(size, size, generator=generator, dtype=torch.float64)

    left, right = (torch.linalg.qr(normal()).Q for _ in range(2))
    a = (left * torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)) @ right
    a = a.to(dtype)
    error = normal()
    error *= 1e-3 / torch.linalg.matrix_norm(error)
    x = torch.linalg.inv(a.double()) @ (torch.eye(size) - error)
    return a, x.to(dtype)


def reached(method: str, size: int, condition: float, dtype: torch.dtype, draws: int) -> float:
    """The larger of |A X − I| and |X A − I|, median over some matrices."""
    found = []
    for seed in range(draws):
        a, x = problem(size, condition, dtype, seed)
        one = torch.ones(())
        error = error_of_state(a, METHODS[method](a, x), one, one)
        found.append(max(error.right.item(), error.left.item()))
    return statistics.median(found)


def milliseconds(method: str, size: int, repeats: int) -> float:
    a, x = problem(size, 10.0, torch.float32, 0)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        METHODS[method](a, x)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--draws", type=int, default=5, help="matrices for each entry")
    parser.add_argument("--timed-size", type=int, default=256)
    parser.add_argument("--json", type=Path, help="file that takes the numbers as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for method in METHODS:
        row: dict[str, object] = {"method": method}
        row["ms"] = milliseconds(method, arguments.timed_size, 20)
        for dtype, conditions in CONDITIONS.items():
            for condition in conditions:
                key = f"{str(dtype).removeprefix('torch.')} {condition:.0e}"
                row[key] = reached(method, arguments.size, condition, dtype, arguments.draws)
        rows.append(row)
    for dtype in ("float32", "float64"):
        keys = [key for key in rows[0] if key.startswith(dtype)]
        cells = [[row["method"], *(f"{row[key]:.0e}" for key in keys)] for row in rows]
        print(table([dtype, *(key.split()[1] for key in keys)], cells) + "\n")
    print(", ".join(f"{row['method']}: {row['ms']:.1f} ms" for row in rows))
    print(f"{measured()} n = {arguments.size}, timed at {arguments.timed_size}.")
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": measured(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
