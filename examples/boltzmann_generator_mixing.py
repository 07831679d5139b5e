"""P4Inv layers against LULinear, a fixed random permutation and swaps in one and the same flow.

    python examples/boltzmann_generator_mixing.py --sequence SER

Simulates a capped amino acid once, trains the generator's flow by likelihood with each of them,
from several seeds, and writes a table. Runs that are done are not run again.
"""

import dataclasses
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

from experiment import Record, command_line, kept, publish, table, there
from nflows.flows.base import Flow

from p4flows import spline_flow
from p4flows.molecules import (
    BoltzmannGenerator,
    Settings,
    capped_peptide,
    effective_sample_size,
)

SWAPS = {
    "p4": "P4Inv",
    "lu": "LULinear",
    "random-halves": "random permutation",
    "halves": "swaps",
}
COLUMNS: dict[str, Callable[[Record], float]] = {
    "NLL held out (nats)": lambda r: r["held_out"],
    "NLL training": lambda r: r["training"],
    "ESS (%)": lambda r: 100.0 * r["ess"],
    "clipped (%)": lambda r: 100.0 * r["ess_clipped"],
    "s/step": lambda r: r["seconds"] / r["steps"],
}


class Mixed(BoltzmannGenerator):
    """A generator whose flow mixes its columns in another way."""

    swap = "p4"

    def build_flow(self) -> Flow:
        """The flow at its start."""
        return spline_flow(
            self.coordinates.features,
            self.settings.blocks,
            circular=self.coordinates.circular,
            swap=self.swap,
            hidden=self.settings.hidden,
        )


def train(sequence: str, swap: str, seed: int, steps: int, frames: int, output: Path) -> Record:
    """A run, on the frames that all runs share."""
    settings = Settings(temperature=600.0, seed=0)
    molecule, shared = capped_peptide(sequence), output / sequence
    simulated = BoltzmannGenerator(molecule, shared, settings).simulate(frames=frames)
    folder = output / f"{sequence}-{swap}-{seed}-{steps}"
    generator = Mixed(molecule, folder, dataclasses.replace(settings, seed=seed), workers=1)
    generator.swap, generator.frames = swap, simulated
    last = generator.train(steps=steps)[-1]
    log_weights = generator.sample(20_000).log_weights
    return {
        "swap": swap,
        "seed": seed,
        "steps": last.step,
        "seconds": last.seconds,
        "training": last.training,
        "held_out": last.held_out,
        "ess": effective_sample_size(log_weights),
        "ess_clipped": effective_sample_size(log_weights, clip=1e-4),
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
    parser = command_line(__doc__, "results/mixing", seed=False, pool=False)
    parser.add_argument("--sequence", default="SER")
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--frames", type=int, default=15_000, help="of each of six replicas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--swaps", nargs="+", choices=list(SWAPS), default=list(SWAPS))
    arguments = parser.parse_args()
    # That of nflows' LULinear.
    warnings.filterwarnings("ignore", "torch.triangular_solve is deprecated")
    sequence, steps, frames = arguments.sequence, arguments.steps, arguments.frames
    files = []
    for seed in range(arguments.seeds):
        for swap in arguments.swaps:
            job = sequence, swap, seed, steps, frames, arguments.output
            files.append(arguments.output / f"{sequence}-{swap}-{seed}-{steps}-{frames}.json")
            if not arguments.figures:
                kept(files[-1], lambda job=job: train(*job))
    found = list(there(files).values())
    publish(arguments.output / f"{sequence}-{steps}-{frames}.md", found, summary(found))


if __name__ == "__main__":
    main()
