"""What one merge costs the stored inverse, by ln|det G|: the table of docs/results/bounds.md."""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from report import cells, measured, table

from p4flows import InvertibleMatrix

SIZES = (16, 64)
UPDATES = (-14, -12, -10, -8, -6, -4, -2, 2, 4, 6, 8, 10, 12, 14)


def residual(matrix: InvertibleMatrix) -> float:
    """Largest entry of |A A⁻¹ − I|."""
    return matrix.error().right.item()


@torch.no_grad()
def merge_once(size: int, update: float, seed: int) -> tuple[float, float, bool] | None:
    """A merge with ln|det G| = `update` into I + N(0, 1)/√n in float32, and a correction.

    Returns the residual after each and whether LU was needed; None where the merge is refused even
    when forced.
    """
    torch.manual_seed(seed)
    start = torch.eye(size) + torch.randn(size, size) * size**-0.5
    matrix = InvertibleMatrix(size, rank=1, init=start, perturbation="additive")
    matrix.u.normal_()
    # Scaled in float64, as 1 + vᵀA⁻¹u cancels where G is small.
    inverse = torch.linalg.inv(matrix.frozen.double())
    overlap = matrix.v.double().mT @ inverse @ matrix.u.double()
    target = torch.tensor(float(update), dtype=torch.float64).exp()
    matrix.u.copy_(matrix.u.double() * (target - 1) / overlap)
    if not matrix.merge(force=True):
        return None
    merged = residual(matrix)
    rebuilt = bool(matrix.correct())
    return merged, residual(matrix), rebuilt


def row(size: int, update: float, draws: int) -> dict[str, Any]:
    results = [merge_once(size, update, seed) for seed in range(draws)]
    entry = {"size": size, "update": update, "refused": results.count(None)}
    if done := list(filter(None, results)):
        merged, corrected, rebuilt = zip(*done, strict=True)
        medians = {"merged": statistics.median(merged), "corrected": statistics.median(corrected)}
        entry |= {**medians, "rebuilt": sum(rebuilt)}
    return entry


COLUMNS = {
    "merged": lambda e: f"{e['merged']:.0e}",
    "corrected": lambda e: f"{e['corrected']:.0e}",
    "by LU": lambda e: f"{e['rebuilt']:d}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=15, help="matrices for each entry")
    parser.add_argument("--json", type=Path, help="file that takes the numbers as well")
    arguments = parser.parse_args()
    rows = [row(size, update, arguments.draws) for size in SIZES for update in UPDATES]
    found = {(entry["size"], entry["update"]): entry for entry in rows}

    header = ["ln\\|G\\|", *(f"{column}, n = {size}" for size in SIZES for column in COLUMNS)]
    lines = [
        [f"{update:+d}", *(text for size in SIZES for text in cells(found[size, update], COLUMNS))]
        for update in UPDATES
    ]
    print(table(header, lines, text=0))
    print(f"\nRefused even when forced: {sum(entry['refused'] for entry in rows)}.")
    print(f"{measured()} float32, seeds 0–{arguments.draws - 1}.")
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": measured(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
