"""P4Inv layers against LULinear, halves drawn at random and swaps in one and the same flow.

    python examples/boltzmann_generator_mixing.py

Trains the circular spline flow of examples/boltzmann_generator.py by likelihood with each of them,
from several seeds, and writes a table. Runs that are done are not run again.
"""

import dataclasses
import statistics
import warnings
from collections.abc import Callable

import torch
from boltzmann_generator import PRESETS, record_file, run
from experiment import Record, command_line, publish, table, there

SWAPS = {
    "p4": "P4Inv",
    "lu": "LULinear",
    "random-halves": "random halves",
    "halves": "swaps",
}


COLUMNS: dict[str, Callable[[Record], float]] = {
    "NLL held out (nats)": lambda r: r["nll"],
    "NLL training": lambda r: r["nll_training"],
    "ESS (%)": lambda r: 100.0 * r["ess"],
    "clipped (%)": lambda r: 100.0 * r["ess_clipped"],
    "s/step": lambda r: r["training_seconds"] / r["settings"]["steps"],
}


def summary(records: list[Record]) -> str:
    """Mean and standard deviation over the seeds."""

    def spread(values: list[float]) -> str:
        error = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{error}"

    rows = []
    for swap in dict.fromkeys(record["swap"] for record in records):
        own = [record for record in records if record["swap"] == swap]
        means = [spread([number(record) for record in own]) for number in COLUMNS.values()]
        rows.append([SWAPS[swap], str(len(own)), *means])
    return table(["between couplings", "seeds", *COLUMNS], rows)


def main() -> None:
    """Train what is not there yet, then write the table."""
    parser = command_line(__doc__, "results/boltzmann_generator", seed=False)
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--swaps", nargs="+", choices=list(SWAPS), default=list(SWAPS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # That of nflows' LULinear.
    warnings.filterwarnings("ignore", "torch.triangular_solve is deprecated")
    name = f"mixing{arguments.steps}"
    PRESETS[name] = dataclasses.replace(
        PRESETS["quick"], steps=arguments.steps, rounds=0, samples=20_000
    )
    jobs = [
        (name, swap, seed, arguments.output)
        for seed in range(arguments.seeds)
        for swap in arguments.swaps
    ]
    if not arguments.figures:
        # One after the other: the workers are those of the simulation.
        for job in jobs:
            run(*job, arguments.workers)
    found = list(there(record_file(*job) for job in jobs).values())
    publish(arguments.output / f"{name}.md", found, summary(found))


if __name__ == "__main__":
    main()
