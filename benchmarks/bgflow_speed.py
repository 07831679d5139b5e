"""A training step with the layers here and with bgflow's own, in one run.

    python benchmarks/bgflow_speed.py --threads 1

A step is forward, backward and Adam on the negative log-likelihood. It is timed without merges, as
99 of 100 are, and with a merge of all layers in each. Needs bgflow; docs/bgflow.md has the command.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import NamedTuple

import bgflow
import torch
from report import measured, table
from timing import Timing, interleaved
from torch import nn
from torch.optim import Adam

from p4flows import MergeHook
from p4flows.bgflow import BentStackFlow, P4InvFlow, realnvp_flow


def their_layer() -> nn.Module:
    return bgflow.InvertiblePPPP(60, init="reverse")


def our_layer() -> nn.Module:
    return P4InvFlow(60, init="reverse", rank=1, perturbation="additive")


def their_realnvp(layer: Callable[[], nn.Module]) -> nn.Module:
    """bgflow's couplings, in the architecture of `realnvp_flow(60, 25)`."""
    layers: list[nn.Module] = []
    for _ in range(50):
        shift, scale = (
            bgflow.DenseNet((30, 60, 60, 30), activation()) for activation in (nn.ReLU, nn.Tanh)
        )
        coupling = bgflow.CouplingFlow(bgflow.AffineTransformer(shift, scale))
        layers += [bgflow.SplitFlow(30), coupling, bgflow.MergeFlow(30), layer()]
    return bgflow.SequentialFlow(layers)


def theirs_bent_stack() -> nn.Module:
    block = [
        lambda: bgflow.InvertiblePPPP(2),
        bgflow.BentIdentity,
        lambda: bgflow.InvertiblePPPP(2),
        lambda: bgflow.InverseFlow(bgflow.BentIdentity()),
    ]
    return bgflow.SequentialFlow([layer() for _ in range(100) for layer in block])


class Case(NamedTuple):
    """The same flow of both libraries, and the shape of a batch."""

    shape: tuple[int, int]
    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]


CASES = {
    "one layer, n = 1024": Case(
        (256, 1024),
        lambda: P4InvFlow(1024, rank=1, perturbation="additive"),
        lambda: bgflow.InvertiblePPPP(1024),
    ),
    "RealNVP, n = 60, 25 blocks": Case(
        (256, 60),
        lambda: realnvp_flow(60, blocks=25, paper=True),
        lambda: their_realnvp(their_layer),
    ),
    "RealNVP of bgflow's couplings, n = 60, 25 blocks": Case(
        (256, 60),
        lambda: their_realnvp(our_layer),
        lambda: their_realnvp(their_layer),
    ),
    "P4Inv and Bent identities, n = 2, 100 blocks": Case(
        (200, 2),
        lambda: BentStackFlow(2, blocks=100, rank=1, perturbation="additive"),
        theirs_bent_stack,
    ),
}


def training_step(flow: nn.Module, shape: tuple[int, int], merging: bool) -> Callable[[], None]:
    """One step of either library."""
    # So small that the flow stays where it is however long it is timed.
    optimizer = Adam(flow.parameters(), lr=1e-6)
    scheduler = None
    if merging and any(isinstance(layer, bgflow.InvertiblePPPP) for layer in flow.modules()):
        scheduler = bgflow.PPPPScheduler(flow, optimizer)
    elif merging:
        MergeHook(flow, optimizer, every=1)
    x = torch.randn(shape)

    def step() -> None:
        optimizer.zero_grad()
        y, dlogp = flow(x)
        (0.5 * y.square().sum(-1, keepdim=True) - dlogp).mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

    return step


def cell(timing: Timing) -> str:
    median, low, high = (1e3 * t for t in (timing.median, timing.low, timing.high))
    return f"{median:.1f} ({low:.1f}–{high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")

    rows = []
    for title, case in CASES.items():
        for merging in (False, True):
            timings = interleaved(
                {
                    "p4flows": training_step(case.ours(), case.shape, merging),
                    "bgflow": training_step(case.theirs(), case.shape, merging),
                },
                rounds=arguments.rounds,
                title=title,
            )
            ours, theirs = timings["p4flows"], timings["bgflow"]
            merges = "each step" if merging else "none"
            ratio = f"{ours.median / theirs.median:.3f}"
            rows.append([title, str(case.shape[0]), merges, cell(ours), cell(theirs), ratio])
    print(table(["flow", "batch", "merges", "p4flows", "bgflow", "ratio"], rows))
    print(f"\nMilliseconds a step, median and quartiles. {measured()}")


if __name__ == "__main__":
    main()
