"""P4Inv layers against a fixed random permutation, LULinear and swaps in one and the same flow.

    python examples/boltzmann_generator_mixing.py

Trains the circular spline flow of examples/boltzmann_generator.py by likelihood with each of them,
from several seeds, and writes a table. Runs that are done are not run again.
"""

import argparse
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boltzmann_generator import PRESETS, run

SWAPS = {
    "p4": "P4Inv",
    "lu": "LULinear",
    "permutation": "random permutation",
    "halves": "swaps",
}


def table(records: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over the seeds as Markdown."""

    def spread(found: list[dict[str, Any]], number: Any) -> str:
        values = np.array([number(record) for record in found])
        if len(values) == 1:
            return f"{values[0]:.3f}"
        return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"

    lines = [
        "| between couplings | seeds | NLL held out (nats) | NLL training | ESS (%) | clipped (%) "
        "| s/step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for swap, found in records.items():
        numbers = (
            lambda r: r["nll"],
            lambda r: r["nll_training"],
            lambda r: 100.0 * r["ess"],
            lambda r: 100.0 * r["ess_clipped"],
            lambda r: r["training_seconds"] / r["settings"]["steps"],
        )
        cells = " | ".join(spread(found, number) for number in numbers)
        lines.append(f"| {SWAPS[swap]} | {len(found)} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is not there yet, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--swaps", nargs="+", choices=list(SWAPS), default=list(SWAPS))
    parser.add_argument("--workers", type=int, default=2, help="processes of the simulation")
    parser.add_argument("--output", type=Path, default=Path("results/boltzmann_generator"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    # That of nflows' LULinear.
    warnings.filterwarnings("ignore", "torch.triangular_solve is deprecated")
    name = f"mixing{arguments.steps}"
    PRESETS[name] = dataclasses.replace(
        PRESETS["quick"], steps=arguments.steps, rounds=0, samples=20_000
    )
    records: dict[str, list[dict[str, Any]]] = {swap: [] for swap in arguments.swaps}
    for seed in range(arguments.seeds):
        for swap in arguments.swaps:
            records[swap].append(run(name, swap, seed, arguments.output, arguments.workers))
            found = {swap: done for swap, done in records.items() if done}
            (arguments.output / f"{name}.md").write_text(table(found))
    print(table(records))


if __name__ == "__main__":
    main()
