"""What matters for P4Inv layers in a Boltzmann generator: short trainings, one change at a time.

    python examples/alanine_dipeptide_ablation.py

The data and the figures of merit of examples/alanine_dipeptide.py (all replicas but the last, by
likelihood alone, a learning rate from 1e-3 to 0 on a cosine). Variants that are done are not run
again.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import re
from pathlib import Path
from typing import Any

import torch
from alanine_dipeptide import PRESETS, Problem, evaluate
from alanine_dipeptide_flows import FEATURES, Swap, affine_flow, spline_flow
from nflows.transforms import CompositeTransform, Permutation

from p4flows import MergeHook, fit


@dataclasses.dataclass(frozen=True)
class Variant:
    """What stands between the couplings and how it is trained, by default as in the example."""

    swap: Swap = "p4"
    rank: int = 1
    every: int = 100
    restart: str = "v"
    draw: str = "normal"
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
    'P4Inv, draw="basis"': Variant(draw="basis"),
    'P4Inv, restart="carry"': Variant(restart="carry"),
}
FLOWS = {"affine": affine_flow, "spline": spline_flow}


def run(couplings: str, name: str, steps: int, seed: int, output: Path) -> dict[str, Any]:
    """Train one variant; its numbers, kept in a file of its own."""
    record_file = output / (re.sub(r"\W+", "-", f"{couplings} {name} {steps} {seed}") + ".json")
    if record_file.exists():
        return json.loads(record_file.read_text())
    torch.set_num_threads(1)
    variant = VARIANTS[name]
    problem = Problem(PRESETS["paper"], output.parent, workers=1, progress=False)
    if variant.shuffled:
        order = torch.randperm(FEATURES, generator=torch.Generator().manual_seed(seed))
        problem.coordinates = CompositeTransform([problem.coordinates, Permutation(order)])
        problem.features = problem.features[:, order]
    torch.manual_seed(seed)
    flow = FLOWS[couplings](variant.swap, rank=variant.rank)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True)
    hook = None
    if variant.swap == "p4":
        hook = MergeHook(
            flow, optimizer, every=variant.every, restart=variant.restart, draw=variant.draw
        )
    fit(
        flow,
        problem.batch,
        steps=steps,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        hook=hook,
        generator=torch.Generator().manual_seed(seed),
    )
    numbers, _ = evaluate(problem, flow, seed)
    record = {"variant": name, **numbers}
    record_file.write_text(json.dumps(record, indent=2) + "\n")
    return record


def table(couplings: str, records: list[dict[str, Any]]) -> str:
    """The numbers of all variants of one kind of coupling as Markdown."""
    lines = [
        f"| {couplings} couplings | NLL (nats) | median shift (k_BT) | low energy | KL φ | KL ψ |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['variant']} | {r['nll']:.2f} | {r['median_shift']:+.2f} | "
        f"{r['low_energy_fraction']:.1%} | {r['kl_phi']:.3f} | {r['kl_psi']:.3f} |"
        for r in records
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train all variants, then write a table for each kind of coupling."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--couplings", nargs="+", choices=sorted(FLOWS), default=sorted(FLOWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--output", type=Path, default=Path("results/alanine_dipeptide/ablation"))
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        futures = {
            couplings: [
                pool.submit(run, couplings, name, arguments.steps, arguments.seed, output)
                for name in VARIANTS
            ]
            for couplings in arguments.couplings
        }
        tables = [
            table(couplings, [future.result() for future in found])
            for couplings, found in futures.items()
        ]
    text = "\n".join(tables)
    (output / f"ablation-{arguments.steps}-{arguments.seed}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
