"""Find a rotation: what orthogonal layers learn in so many steps, at their best learning rate.

    python benchmarks/rotation.py --size 64

Online least squares with batches of 64 rows, Adam, cosine to zero. Each contestant is trained at
each rate, and its row is that of the rate with the smallest loss at the end. The loss is the
squared distance of the weight to the rotation, divided by n.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from report import table
from torch import nn
from torch.nn.utils import parametrizations
from tqdm.auto import tqdm

import p4flows
from p4flows import MergeHook
from p4flows.matrices import PerturbedMatrix

BATCH = 64


def by_torch(name: str) -> Callable[[nn.Linear], nn.Module]:
    return lambda layer: parametrizations.orthogonal(layer, orthogonal_map=name)


CONTESTANTS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "p4flows.orthogonal": p4flows.orthogonal,
    "torch, cayley": by_torch("cayley"),
    "torch, matrix_exp": by_torch("matrix_exp"),
    "torch, householder": by_torch("householder"),
    "nn.Linear (not orthogonal)": lambda layer: layer,
}


def run(
    make: Callable[[nn.Linear], nn.Module], size: int, rate: float, steps: int, seed: int
) -> dict[str, Any]:
    """Losses after a quarter, half and all steps, CPU ms of a step, and ‖QᵀQ − I‖₂ at the end."""
    torch.manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(size, size)).Q
    rotation[0] *= torch.linalg.slogdet(rotation).sign
    layer = make(nn.Linear(size, size, bias=False))
    with torch.no_grad():
        if layer.weight.grad_fn is None and isinstance(layer.weight, nn.Parameter):
            layer.weight.copy_(torch.eye(size))
        else:
            layer.weight = torch.eye(size)
    optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if any(isinstance(each, PerturbedMatrix) for each in layer.modules()):
        MergeHook(layer, optimizer)
    losses, seconds = [], 0.0
    for step in range(1, steps + 1):
        x = torch.randn(BATCH, size)
        started = time.process_time()
        optimizer.zero_grad()
        (layer(x) - x @ rotation.mT).square().mean().backward()
        optimizer.step()
        seconds += time.process_time() - started
        schedule.step()
        if step in (steps // 4, steps // 2, steps):
            losses.append((layer.weight - rotation).square().sum().item() / size)
    weight = layer.weight.detach().double()
    error = torch.linalg.matrix_norm(weight.mT @ weight - torch.eye(size), 2).item()
    return {"losses": losses, "ms": 1e3 * seconds / steps, "error": error, "rate": rate}


def main() -> None:
    """Train all and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=None)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in tqdm(arguments.contestants or CONTESTANTS):
        make = CONTESTANTS[name]
        runs = [
            run(make, arguments.size, rate, arguments.steps, arguments.seed)
            for rate in arguments.rates
        ]
        best = min(runs, key=lambda found: found["losses"][-1])
        losses = [f"{loss:.1e}" for loss in best["losses"]]
        rows.append([name, *losses, f"{best['ms']:.2f}", f"{best['error']:.0e}", f"{best['rate']}"])
    after = [f"after {arguments.steps // part}" for part in (4, 2, 1)]
    print(table([f"n = {arguments.size}", *after, "CPU ms", "‖QᵀQ − I‖₂", "rate"], rows))


if __name__ == "__main__":
    main()
