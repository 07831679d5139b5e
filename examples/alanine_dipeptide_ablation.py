"""What matters for P4Inv layers in a Boltzmann generator: short trainings, one change at a time.

    python examples/alanine_dipeptide_ablation.py

The data and the figures of merit of examples/alanine_dipeptide.py (all replicas but the last, by
likelihood alone, a learning rate from 1e-3 to 0 on a cosine). Variants that are done are not run
again.
"""

import dataclasses
import re
from pathlib import Path

import torch
from alanine_dipeptide import PRESETS, Problem, evaluate
from alanine_dipeptide_flows import FEATURES, Swap, affine_flow, spline_flow
from experiment import Record, cells, command_line, in_processes, kept, publish, table, there
from nflows.transforms import CompositeTransform, Permutation

from p4flows import MergeHook
from p4flows.lightning import fit


@dataclasses.dataclass(frozen=True)
class Variant:
    """What stands between the couplings and how it is trained, by default as in the example."""

    swap: Swap = "p4"
    rank: int = 1
    every: int = 100
    paper: bool = True  # how v is drawn, and what becomes of its optimizer state
    shuffled: bool = False  # columns of the features in random order


VARIANTS = {
    "swaps": Variant("permutation"),
    "swaps, columns in random order": Variant("permutation", shuffled=True),
    "P4Inv: N = 100, rank 1": Variant(),
    "P4Inv, columns in random order": Variant(shuffled=True),
    "P4Inv, N = 10": Variant(every=10),
    "P4Inv, N = 1": Variant(every=1),
    "P4Inv, N = 500": Variant(every=500),
    "P4Inv, rank 4": Variant(rank=4),
    "P4Inv, v from bases, momentum carried": Variant(paper=False),
}
FLOWS = {"affine": affine_flow, "spline": spline_flow}


def record_file(couplings: str, name: str, steps: int, seed: int, output: Path) -> Path:
    return output / (re.sub(r"\W+", "-", f"{couplings} {name} {steps} {seed}") + ".json")


def run(couplings: str, name: str, steps: int, seed: int, output: Path) -> Record:
    """Train one variant; its numbers, kept in a file of its own."""
    return kept(
        record_file(couplings, name, steps, seed, output),
        lambda: train(couplings, name, steps, seed, output),
    )


def train(couplings: str, name: str, steps: int, seed: int, output: Path) -> Record:
    variant = VARIANTS[name]
    problem = Problem(PRESETS["paper"], output.parent, workers=1, progress=False)
    if variant.shuffled:
        order = torch.randperm(FEATURES, generator=torch.Generator().manual_seed(seed))
        problem.coordinates = CompositeTransform([problem.coordinates, Permutation(order)])
        problem.features = problem.features[:, order]
    torch.manual_seed(seed)
    flow = FLOWS[couplings](variant.swap, rank=variant.rank)
    hook: MergeHook | bool = False
    if variant.swap == "p4":
        hook = MergeHook(flow, every=variant.every, paper=variant.paper)
    fit(flow, problem.batch, max_steps=steps, learning_rate=1e-3, hook=hook, seed=seed)
    numbers, _ = evaluate(problem, flow, seed)
    return {"couplings": couplings, "variant": name, "seed": seed, **numbers}


COLUMNS = {
    "NLL (nats)": lambda r: f"{r['nll']:.2f}",
    "median shift (k_BT)": lambda r: f"{r['median_shift']:+.2f}",
    "low energy": lambda r: f"{r['low_energy_fraction']:.1%}",
    "KL φ": lambda r: f"{r['kl_phi']:.3f}",
    "KL ψ": lambda r: f"{r['kl_psi']:.3f}",
}


def tables(records: list[Record]) -> list[str]:
    """The numbers of all variants, a table for each kind of coupling."""
    parts = []
    for couplings in dict.fromkeys(record["couplings"] for record in records):
        own = [record for record in records if record["couplings"] == couplings]
        rows = [[record["variant"], *cells(record, COLUMNS)] for record in own]
        parts.append(table([f"{couplings} couplings", *COLUMNS], rows))
    return parts


def main() -> None:
    """Train the variants that are missing, then write the tables of those that are there."""
    parser = command_line(__doc__, "results/alanine_dipeptide/ablation")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--couplings", nargs="+", choices=sorted(FLOWS), default=sorted(FLOWS))
    arguments = parser.parse_args()
    output, steps, seed = arguments.output, arguments.steps, arguments.seed
    jobs = [
        (couplings, name, steps, seed, output)
        for couplings in arguments.couplings
        for name in VARIANTS
    ]
    if not arguments.figures:
        in_processes(run, jobs, arguments.workers)
    found = list(there(record_file(*job) for job in jobs).values())
    publish(output / f"ablation-{steps}-{seed}.md", found, *tables(found))


if __name__ == "__main__":
    main()
