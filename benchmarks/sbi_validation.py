"""Validation log-probability in sbi's own loop: LULinear, P4Inv with its hook, and without.

    python benchmarks/sbi_validation.py

Neural posterior estimation of a linear Gaussian in ten dimensions with sbi's neural spline flow, as
sbi builds it (LULinear) and with its linear layers swapped; defaults of sbi throughout. Prints a
Markdown table: the best validation log-probability of each seed, and the seconds of training.
"""

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import torch
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


def run(name: str, seed: int) -> dict[str, float]:
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
        "seconds": time.process_time() - begin,
        "log_prob": -summary["best_validation_loss"][-1],
        "epochs": summary["epochs_trained"][-1],
    }


def main() -> None:
    """Every contestant with every seed; a run that is there is not run again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("results/sbi_validation.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = arguments.output
    records = json.loads(file.read_text()) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for name in CONTESTANTS:
            key = f"{name} {seed}"
            if key not in records:
                records[key] = run(name, seed)
                file.write_text(json.dumps(records, indent=2) + "\n")
                print(key, records[key], flush=True)
    seeds = " | ".join(f"seed {seed}" for seed in arguments.seeds)
    print(f"\n| validation log-probability | {seeds} | CPU seconds | epochs |")
    print("|---|" + "---:|" * (len(arguments.seeds) + 2))
    for name in CONTESTANTS:
        found = [records[f"{name} {seed}"] for seed in arguments.seeds]
        values = " | ".join(f"{each['log_prob']:.2f}" for each in found)
        seconds = sum(each["seconds"] for each in found) / len(found)
        epochs = sum(each["epochs"] for each in found) / len(found)
        print(f"| {name} | {values} | {seconds:.0f} | {epochs:.0f} |")


if __name__ == "__main__":
    main()
