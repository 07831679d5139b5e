"""What fails with bgflow's InvertiblePPPP and PPPPScheduler, side by side with p4flows.

    python tests/bgflow_faults.py

Every case does the same with the layers of both and says what came of it. Without bgflow there is
only one side; docs/bgflow.md has the command that installs it.
"""

import copy
import functools
import os
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer
from torch.utils.flop_counter import FlopCounterMode

from p4flows import MergeHook, P4InvTransform


class P4flows:
    """The layers here, under the names that the cases use."""

    title = "p4flows"

    def layer(self, size: int, weight: Tensor | None = None) -> nn.Module:
        start: str | Tensor = "identity" if weight is None else weight
        return P4InvTransform(size, init=start, rank=1, perturbation="additive")

    def factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        return layer.matrix.u.detach().squeeze(-1), layer.matrix.v.detach().squeeze(-1)

    def frozen(self, layer: Any) -> Tensor:
        return layer.matrix.frozen

    def stored_determinant(self, layer: Any) -> Tensor:
        return layer.matrix.logabsdet_frozen

    def inverse(self, layer: Any, y: Tensor) -> Tensor:
        return layer.inverse(y)[0]

    def merge(self, layer: Any) -> None:
        layer.matrix.merge(force=True)

    def merge_at_each_step(
        self, module: nn.Module, optimizer: Optimizer, correct: int = 50, determinant: int = 50
    ) -> Callable[[], None]:
        # A correction refreshes both the inverse and the determinant.
        MergeHook.paper(module, optimizer, every=1, correct_every=min(correct, determinant))
        return lambda: None


class Bgflow:
    """Those of bgflow."""

    title = "bgflow"

    def __init__(self) -> None:
        import numpy

        numpy.infty = numpy.inf  # all that bgflow misses in NumPy 2
        import bgflow

        self.bgflow = bgflow

    def layer(self, size: int, weight: Tensor | None = None) -> nn.Module:
        layer = self.bgflow.InvertiblePPPP(size)
        if weight is not None:
            layer.A.copy_(weight)
            layer.Ainv.copy_(torch.linalg.inv(weight))
            layer.correct(recompute_det=True)
        return layer

    def factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        return layer.u.detach(), layer.v.detach()

    def frozen(self, layer: Any) -> Tensor:
        return layer.A

    def stored_determinant(self, layer: Any) -> Tensor:
        return layer.detA

    def inverse(self, layer: Any, y: Tensor) -> Tensor:
        return layer(y, inverse=True)[0]

    def merge(self, layer: Any) -> None:
        layer.pppp_merge(force_merge=True)

    def merge_at_each_step(
        self, module: nn.Module, optimizer: Optimizer, correct: int = 50, determinant: int = 50
    ) -> Callable[[], None]:
        scheduler = self.bgflow.PPPPScheduler(
            module, optimizer, n_correct=correct, n_recompute_det=determinant
        )
        return scheduler.step


Library = P4flows | Bgflow


class Outcome(NamedTuple):
    """Whether a case went well, and what was seen."""

    good: bool
    seen: str


def attempt(action: Callable[[], Any]) -> Outcome:
    try:
        action()
    except Exception as error:
        return Outcome(False, textwrap.shorten(f"{type(error).__name__}: {error}", 80))
    return Outcome(True, "works")


def train(
    library: Library,
    layer: nn.Module,
    optimizer: Optimizer,
    *,
    steps: int = 3,
    readout: Callable[[Tensor], Tensor] = lambda y: y,
    **intervals: int,
) -> None:
    """Learn y = 2x with a merge after each step."""
    after_step = library.merge_at_each_step(layer, optimizer, **intervals)
    for _ in range(steps):
        x = torch.randn(16, 4)
        optimizer.zero_grad()
        (readout(layer(x)[0]) - 2 * x).square().mean().backward()
        optimizer.step()
        after_step()


def copied_after_a_training_pass(library: Library) -> Outcome:
    layer = library.layer(4)
    layer(torch.randn(8, 4))
    return attempt(lambda: copy.deepcopy(layer))


def train_without_argument(library: Library) -> Outcome:
    return attempt(library.layer(4).train)


def evaluated_at_a_singular_perturbation(library: Library) -> Outcome:
    layer = library.layer(4)
    u, v = library.factors(layer)
    u.copy_(torch.tensor([-1.0, 0.0, 0.0, 0.0]))
    v.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    layer.eval()
    # Training leaves the singular matrix again.
    u.fill_(0.1)
    inverse = library.inverse(layer.train(True), torch.ones(1, 4))
    return Outcome(bool(inverse.isfinite().all()), f"inverse then {inverse[0, 0]:.2f}")


def determinant_of_a_large_matrix(library: Library) -> Outcome:
    """2.5·I in 128 dimensions, float32."""
    return _logabsdet(library, library.layer(128, 2.5 * torch.eye(128)))


def determinant_after_many_merges(library: Library) -> Outcome:
    """2,000 random merges in 64 dimensions, float32."""
    torch.manual_seed(0)
    layer = library.layer(64)
    for _ in range(2_000):
        for factor in library.factors(layer):
            factor.normal_(std=0.5)
        library.merge(layer)
    return _logabsdet(library, layer)


@torch.no_grad()
def _logabsdet(library: Library, layer: nn.Module) -> Outcome:
    found = layer(torch.zeros(1, len(library.frozen(layer))))[1].item()
    exact = torch.linalg.slogdet(library.frozen(layer).double()).logabsdet.item()
    return Outcome(abs(found - exact) < 0.1, f"logabsdet {found:.2f}, exact {exact:.2f}")


def momentum_of_other_parameters(library: Library) -> Outcome:
    torch.manual_seed(0)
    layer, readout = library.layer(4), nn.Linear(4, 4)
    optimizer = SGD([*layer.parameters(), *readout.parameters()], lr=0.01, momentum=0.9)
    train(library, layer, optimizer, readout=readout)
    kept = "momentum_buffer" in optimizer.state[readout.weight]
    return Outcome(kept, "kept by a merge" if kept else "wiped by a merge")


def adam(library: Library, **options: bool) -> Outcome:
    layer = library.layer(4)
    optimizer = Adam(layer.parameters(), **options)
    return attempt(lambda: train(library, layer, optimizer))


def compiled_without_breaks(library: Library) -> Outcome:
    torch.compiler.reset()
    layer = torch.compile(library.layer(4), fullgraph=True, backend="eager")
    return attempt(lambda: layer(torch.randn(8, 4)))


def determinant_recomputed(library: Library) -> Outcome:
    """Corrections every 3 merges, determinants every 2; does the second merge mend one?"""
    layer = library.layer(4)
    library.stored_determinant(layer).fill_(7.0)
    optimizer = SGD(layer.parameters(), lr=0.01)
    train(library, layer, optimizer, steps=2, correct=3, determinant=2)
    return _logabsdet(library, layer)


def matrix_products_of_a_step(library: Library) -> Outcome:
    """Forward and backward, in units of the product of the batch and a matrix of this size."""
    size = batch = 256
    layer = library.layer(size)
    x = torch.randn(batch, size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    products = counter.get_total_flops() / (2 * size * size * batch)
    return Outcome(products < 2.1, f"{products:.1f} matrix products")


def ranks_of_distributed_training(library: Library) -> Outcome:
    """DistributedDataParallel, two ranks, two merges and a step."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (library.title, folder), nprocs=2)
        first, second = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(2))
    difference = (first - second).abs().max().item()
    return Outcome(difference == 0.0, f"the ranks' matrices differ by {difference:.1e}")


def _rank(rank: int, title: str, folder: str) -> None:
    torch.set_num_threads(1)
    library = libraries()[title]
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(rank)
    model = DistributedDataParallel(library.layer(4))
    train(library, model, SGD(model.parameters(), lr=0.1), steps=3)
    with torch.no_grad():
        torch.save(model.module(torch.eye(4))[0], f"{folder}/{rank}.pt")
    distributed.barrier()
    # The result is on disk. Taking gloo's threads down with the interpreter aborts the process now
    # and then, in one of some twenty runs on a busy machine.
    os._exit(0)


CASES: dict[str, Callable[[Library], Outcome]] = {
    "deepcopy after a training pass": copied_after_a_training_pass,
    "layer.train()": train_without_argument,
    "eval() at a singular perturbation": evaluated_at_a_singular_perturbation,
    "determinant of 2.5·I, n = 128": determinant_of_a_large_matrix,
    "determinant after 2,000 merges, n = 64": determinant_after_many_merges,
    "momentum of other parameters": momentum_of_other_parameters,
    "Adam(fused=True)": functools.partial(adam, fused=True),
    "Adam(foreach=True)": functools.partial(adam, foreach=True),
    "torch.compile(fullgraph=True)": compiled_without_breaks,
    "DistributedDataParallel, two merges": ranks_of_distributed_training,
    "determinant recomputed on its own interval": determinant_recomputed,
    "cost of a step": matrix_products_of_a_step,
}


def libraries() -> dict[str, Library]:
    """p4flows and, where it can be imported, bgflow; by title."""
    found: list[Library] = [P4flows()]
    try:
        found.append(Bgflow())
    except (ImportError, AttributeError) as error:
        print(f"bgflow cannot be imported ({error}): docs/bgflow.md says how to install it")
    return {library.title: library for library in found}


def main() -> None:
    """The cases as a Markdown table."""
    warnings.simplefilter("ignore")
    found = libraries()
    print(f"torch {torch.__version__}\n")
    print("| case | " + " | ".join(found) + " |")
    print("|---|" + "---|" * len(found))
    for name, case in CASES.items():
        cells = [case(library).seen for library in found.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
