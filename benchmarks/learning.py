"""What a linear layer learns: test likelihood against steps and against seconds.

    python benchmarks/learning.py --task patches8 --steps 1000
    python benchmarks/learning.py --task ica256 --contestants p4 lu relative-sgd --rates 1e-3 1e-2
    python benchmarks/learning.py --task patches8 --steps 1000 --table

Each contestant is trained at every learning rate of its grid with seed 0, then at its best rate
with the other seeds; the rate falls to zero on a cosine. A run is one file under the output
folder: what is there is not run again, and an interrupted call continues. Table and curves are
made of all runs of that task and that number of steps. Seconds are those of training alone.
"""

import argparse
import functools
import math
import time
from pathlib import Path
from typing import Any

import report  # noqa: F401, puts examples/ on the path
import torch
from experiment import command_line, in_processes, kept, publish, read
from learning_contestants import CONTESTANTS
from learning_data import SIZES, TASKS, Task
from learning_report import best_rate, curves, summary
from torch import nn
from tqdm.auto import tqdm

BATCH = 256
# Evaluations, after the same number of steps each.
POINTS = 20
EVALUATION_ROWS = 1_000


@torch.no_grad()
def evaluate(task: Task, flow: nn.Module) -> float:
    """The reported quantity on the test data."""
    flow.eval()
    parts = [flow.log_prob(rows).double().sum() for rows in task.held_out.split(EVALUATION_ROWS)]
    flow.train()
    return (task.offset - sum(parts).item() / len(task.held_out)) / task.per


def train(task: Task, name: str, rate: float, seed: int, steps: int, title: str) -> dict[str, Any]:
    """One run: the curve of the test quantity, and the step at which it diverged, if it did."""
    contestant = CONTESTANTS[name]
    torch.manual_seed(seed)
    flow = task.flow(contestant.layer)
    optimizer = contestant.optimizer(flow.parameters(), rate)
    hook = contestant.hook(flow, optimizer) if contestant.hook is not None else None
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    clocks = Clocks()
    curve = [{"step": 0, "cpu": 0.0, "wall": 0.0, "value": evaluate(task, flow)}]
    diverged = None
    for step in tqdm(range(1, steps + 1), desc=title, leave=False, mininterval=1.0):
        batch = task.batch(BATCH, generator)
        try:
            with clocks:
                optimizer.zero_grad()
                loss = -flow.log_prob(batch).mean()
                loss.backward()
                optimizer.step()
                scheduler.step()
                value = loss.item()
            if math.isfinite(value) and step * POINTS // steps > (step - 1) * POINTS // steps:
                value = evaluate(task, flow)
                point = {"step": step, "cpu": clocks.cpu, "wall": clocks.wall, "value": value}
                curve.append(point)
        except torch.linalg.LinAlgError:
            # A matrix that is not finite stops its factorisation before it reaches the loss.
            value = math.nan
        if not math.isfinite(value):
            diverged = step
            break
    return {
        "contestant": name,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "quantity": task.quantity,
        "diverged": diverged,
        "parameters": sum(p.numel() for p in flow.parameters() if p.requires_grad),
        "merges": dict(hook.stats) if hook is not None else None,
        "curve": [point for point in curve if math.isfinite(point["value"])],
    }


class Clocks:
    """Seconds within the `with` blocks, by the clock of the process and by that of the wall."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def __enter__(self) -> None:
        self._began = time.process_time(), time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.cpu += time.process_time() - self._began[0]
        self.wall += time.perf_counter() - self._began[1]


def record_file(output: Path, task: str, steps: int, name: str, rate: float, seed: int) -> Path:
    return output / f"{task}-{steps}" / f"{name}-{rate:g}-{seed}.json"


# A process keeps the data of the last task: its runs share it.
@functools.lru_cache(maxsize=1)
def data(task_name: str, output: Path, mnist_directory: Path | None) -> Task:
    return TASKS[task_name](output, mnist_directory)


def run(
    task_name: str,
    steps: int,
    name: str,
    rate: float,
    seed: int,
    output: Path,
    mnist_directory: Path | None,
) -> dict[str, Any]:
    """The record of a run, made now or found."""

    def make() -> dict[str, Any]:
        task = data(task_name, output, mnist_directory)
        title = f"{task_name} {name} {rate:g} seed {seed}"
        return {"task": task_name, **train(task, name, rate, seed, steps, title)}

    return kept(record_file(output, task_name, steps, name, rate, seed), make)


def grid(arguments: argparse.Namespace) -> None:
    """All runs of the call that are missing: the rates with seed 0, then the other seeds."""
    first, *others = arguments.seeds
    # Here as well, so that a missing file is noticed at once and a trajectory simulated once.
    data(arguments.task, arguments.output, arguments.mnist_dir)

    def run_all(runs: list[tuple[str, float, int]]) -> None:
        which, where = (arguments.task, arguments.steps), (arguments.output, arguments.mnist_dir)
        in_processes(run, [(*which, *found, *where) for found in runs], arguments.workers)

    names = arguments.contestants
    rates = {name: arguments.rates or CONTESTANTS[name].rates for name in names}
    run_all([(name, rate, first) for name in names for rate in rates[name]])
    found = records(arguments)
    best = {
        name: best_rate([record for record in found if record["contestant"] == name], first)
        for name in names
    }
    run_all([(name, rate, seed) for name, rate in best.items() if rate for seed in others])


def records(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every record of the task and this number of steps, those of earlier calls included."""
    folder = arguments.output / f"{arguments.task}-{arguments.steps}"
    return [record for file in sorted(folder.glob("*.json")) if (record := read(file))]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "results/learning", seed=False)
    parser.add_argument("--task", choices=list(TASKS), default="patches8")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), help="default: all")
    parser.add_argument("--rates", type=float, nargs="+", help="default: each contestant's grid")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--quick", action="store_true", help="a look: 50 steps, two rates, one seed"
    )
    parser.add_argument("--table", dest="figures", action="store_true", help="as --figures")
    parser.add_argument("--mnist-dir", type=Path, help="folder of MNIST's IDX files")
    arguments = parser.parse_args()
    if arguments.task == "mnist" and arguments.mnist_dir is None and not arguments.figures:
        parser.error("--task mnist needs --mnist-dir, the folder of its IDX files")
    if arguments.quick:
        arguments.steps, arguments.seeds = 50, [0]
        arguments.rates = arguments.rates or [3e-3, 1e-2]
    arguments.contestants = [
        name
        for name in arguments.contestants or CONTESTANTS
        if CONTESTANTS[name].takes_part(arguments.task, SIZES[arguments.task])
    ]
    return arguments


def main() -> None:
    """Run what is missing, then write table and curves."""
    arguments = parse_arguments()
    if not arguments.figures:
        grid(arguments)
    found = records(arguments)
    if not found:
        raise SystemExit(f"no runs of {arguments.task}, {arguments.steps} steps: leave out --table")
    stem = arguments.output / f"{arguments.task}-{arguments.steps}"
    publish(stem.with_suffix(".md"), found, *summary(found))
    curves(stem.with_suffix(".png"), found)
    print(f"figure: {stem.with_suffix('.png')}")


if __name__ == "__main__":
    main()
