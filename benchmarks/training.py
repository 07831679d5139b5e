"""What a step costs in `p4flows.lightning.fit`, beside a loop of ten lines.

    python benchmarks/training.py

Both train the same flow from the same batches with a fused Adam, a cosine schedule and a
`MergeHook`, in turns; processor time of the loops, so that other work on the machine counts less.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from lightning.pytorch.callbacks import Callback
from report import measured, table
from torch import Tensor, nn
from tqdm.auto import tqdm

from p4flows import MergeHook, bent_stacked_flow, realnvp_flow
from p4flows.lightning import fit

CASES: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "bent_stacked_flow(2, 100), batch 200": (lambda: bent_stacked_flow(2, 100), 200, 2, 400),
    "realnvp_flow(60, 25), batch 256": (lambda: realnvp_flow(60, 25), 256, 60, 40),
}


Draw = Callable[[torch.Generator], Tensor]


def bare(flow: nn.Module, draw: Draw, steps: int) -> float:
    """Seconds of a loop of one's own."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    MergeHook(flow, optimizer)
    generator, losses = torch.Generator().manual_seed(0), []
    begin = time.process_time()
    for _ in range(steps):
        loss = -flow.log_prob(draw(generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return time.process_time() - begin


class Clock(Callback):
    def on_train_start(self, *arguments: object) -> None:
        self.seconds = -time.process_time()

    def on_train_end(self, *arguments: object) -> None:
        self.seconds += time.process_time()


def by_fit(flow: nn.Module, draw: Draw, steps: int) -> float:
    """Seconds of the same steps, with a progress bar."""
    clock = Clock()
    fit(flow, draw, max_steps=steps, callbacks=[clock])
    return clock.seconds


def milliseconds(train: Callable[..., float], case: str, steps: int) -> float:
    make, batch, features, _ = CASES[case]
    torch.manual_seed(0)
    flow = make()

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randn(batch, features, generator=generator)

    train(flow, draw, 2)  # what is loaded or compiled once
    return 1e3 * train(flow, draw, steps) / steps


def main() -> None:
    """Print a row for each flow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="of a run; 400 and 40 by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case, (_, _, _, steps) in CASES.items():
        pairs = [
            [milliseconds(train, case, arguments.steps or steps) for train in (bare, by_fit)]
            for _ in tqdm(range(arguments.rounds), desc=case)
        ]
        loop, engine = (median(column) for column in zip(*pairs, strict=True))
        ratio = median(b / a for a, b in pairs)
        rows.append([case, f"{loop:.2f}", f"{engine:.2f}", f"{ratio:.2f}"])
    header = ["flow", "loop (ms a step)", "fit (ms a step)", "ratio, median"]
    print(f"{measured()}\n\n{table(header, rows)}")


if __name__ == "__main__":
    main()
