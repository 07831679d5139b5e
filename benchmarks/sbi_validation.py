"""Validation log-probability in sbi's own loop: LULinear, P4Inv with its hook, and without.

    python benchmarks/sbi_validation.py

Neural posterior estimation of a linear Gaussian in ten dimensions with sbi's neural spline flow, as
sbi builds it (LULinear) and with its linear layers swapped; defaults of sbi throughout. Prints a
Markdown table: the best validation log-probability of each seed, and the seconds of training.
"""

import contextlib
import io
import re
import statistics
import time
from pathlib import Path
from typing import Any

import report  # puts examples/ on the path
import torch
from experiment import Record, command_line, kept, publish, there
from sbi.inference import NPE
from sbi.neural_nets.net_builders import build_nsf
from sbi.utils import BoxUniform

from p4flows import MergeHook, swap_linear

DIMENSIONS, SIMULATIONS, NOISE = 10, 5_000, 0.1


def lu(theta: torch.Tensor, x: torch.Tensor) -> Any:
    return build_nsf(theta, x)


def p4(theta: torch.Tensor, x: torch.Tensor) -> Any:
    estimator = swap_linear(build_nsf(theta, x))
    MergeHook(estimator)
    return estimator


def without_hook(theta: torch.Tensor, x: torch.Tensor) -> Any:
    return swap_linear(build_nsf(theta, x))


def paper(theta: torch.Tensor, x: torch.Tensor) -> Any:
    estimator = swap_linear(build_nsf(theta, x), rank=1, perturbation="additive")
    MergeHook.paper(estimator)
    return estimator


CONTESTANTS = {
    "LULinear": lu,
    "P4Inv": p4,
    "P4Inv without a hook": without_hook,
    "P4Inv, the paper's settings": paper,
}


def run(name: str, seed: int) -> Record:
    """One training, all of whose randomness comes from the seed."""
    torch.manual_seed(seed)
    limit = torch.ones(DIMENSIONS)
    prior = BoxUniform(-limit, limit)
    mixing = torch.linalg.qr(torch.randn(DIMENSIONS, DIMENSIONS))[0]
    theta = prior.sample((SIMULATIONS,))
    x = theta @ mixing.T + NOISE * torch.randn_like(theta)
    inference = NPE(prior, density_estimator=CONTESTANTS[name], show_progress_bars=False)
    begin = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        inference.append_simulations(theta, x).train()
    summary = inference.summary
    return {
        "contestant": name,
        "seed": seed,
        "seconds": time.process_time() - begin,
        "log_prob": -summary["best_validation_loss"][-1],
        "epochs": summary["epochs_trained"][-1],
    }


def main() -> None:
    """Every contestant with every seed; a run that is there is not run again."""
    parser = command_line(__doc__, "results/sbi_validation", seed=False, pool=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files: dict[Path, tuple[str, int]] = {
        arguments.output / (re.sub(r"\W+", "-", f"{name} {seed}") + ".json"): (name, seed)
        for seed in arguments.seeds
        for name in CONTESTANTS
    }
    if not arguments.figures:
        for file, job in files.items():
            kept(file, lambda job=job: run(*job))
    records = list(there(files).values())
    rows = []
    for name in CONTESTANTS:
        found = {record["seed"]: record for record in records if record["contestant"] == name}
        if found:
            seconds, epochs = (
                f"{statistics.mean(record[key] for record in found.values()):.0f}"
                for key in ("seconds", "epochs")
            )
            values = [f"{found[s]['log_prob']:.2f}" if s in found else "–" for s in arguments.seeds]
            rows.append([name, *values, seconds, epochs])
    seeds = [f"seed {seed}" for seed in arguments.seeds]
    header = ["validation log-probability", *seeds, "CPU seconds", "epochs"]
    publish(arguments.output / "table.md", records, report.table(header, rows))


if __name__ == "__main__":
    main()
