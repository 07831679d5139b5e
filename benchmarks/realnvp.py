"""A training step of RealNVP by what mixes its channels, beside plain permutations.

    python benchmarks/realnvp.py

60 features, five blocks of two couplings, all flows in turn in one run. A step is forward pass,
negative log-likelihood, backward pass and Adam; P4 layers merge every 50 steps within it.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from nflows.transforms.base import Transform
from nflows.transforms.lu import LULinear
from report import table
from timing import CLOCKS, interleaved
from torch import Tensor, nn

from p4flows import MergeHook, realnvp_flow

FEATURES, BLOCKS = 60, 5
PERMUTATIONS = "permutations"


class Bare(Transform):
    """The product of a linear layer without its log-determinant: the least that mixing costs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.linear(inputs), inputs.new_zeros(len(inputs))


def mixed_by(layer: Callable[[], Transform]) -> nn.Module:
    """The flow with other layers in the place of its permutations."""
    flow = realnvp_flow(FEATURES, BLOCKS, swap="permutation")
    transforms = flow._transform._transforms
    for index in range(1, len(transforms), 2):
        transforms[index] = layer()
    return flow


FLOWS: dict[str, Callable[[], nn.Module]] = {
    PERMUTATIONS: lambda: realnvp_flow(FEATURES, BLOCKS, swap="permutation"),
    "P4InvTransform": lambda: realnvp_flow(FEATURES, BLOCKS),
    "nflows LULinear": lambda: mixed_by(lambda: LULinear(FEATURES, identity_init=True)),
    "bare nn.Linear": lambda: mixed_by(Bare),
}


def fifty_steps(flow: nn.Module, x: Tensor) -> Callable[[], Any]:
    """As many steps as there are between two merges."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-4)
    if any(name.endswith("matrix.u") for name, _ in flow.named_parameters()):
        MergeHook(flow, optimizer)

    def run() -> None:
        for _ in range(50):
            optimizer.zero_grad()
            (-flow.log_prob(x).mean()).backward()
            optimizer.step()

    return run


def main() -> None:
    """Time and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: [name] for name in FLOWS}
    for batch in arguments.batches:
        torch.manual_seed(0)
        x = torch.randn(batch, FEATURES)
        runs = {name: fifty_steps(build(), x) for name, build in FLOWS.items()}
        clock = CLOCKS[arguments.clock]
        timings = interleaved(runs, rounds=arguments.rounds, title=f"batch {batch}", clock=clock)
        for name, timing in timings.items():
            ratio = timing.median / timings[PERMUTATIONS].median
            rows[name].append(f"{timing.median / 50 * 1e3:.2f} ms ({ratio:.2f})")
    print(table(["step", *(f"batch {batch}" for batch in arguments.batches)], list(rows.values())))


if __name__ == "__main__":
    main()
