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
import concurrent.futures
import functools
import json
import math
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import torch
from learning_contestants import CONTESTANTS
from learning_data import SIZES, TASKS, Task
from learning_report import best_rate, curves, summary
from report import environment
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
    file = record_file(output, task_name, steps, name, rate, seed)
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    task = data(task_name, output, mnist_directory)
    title = f"{task_name} {name} {rate:g} seed {seed}"
    record = {"task": task_name, **train(task, name, rate, seed, steps, title)}
    record["environment"] = environment()
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved, so that a kill leaves no half a record.
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(record) + "\n")
    os.replace(aside, file)
    return record


def grid(arguments: argparse.Namespace) -> None:
    """All runs of the call that are missing: the rates with seed 0, then the other seeds."""
    first, *others = arguments.seeds
    # Here as well, so that a missing file is noticed at once and a trajectory simulated once.
    data(arguments.task, arguments.output, arguments.mnist_dir)
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(arguments.workers, mp_context=context) as pool,
        tqdm(desc=f"{arguments.task} runs") as bar,
    ):

        def submit(name: str, rate: float, seed: int) -> concurrent.futures.Future:
            common = arguments.output, arguments.mnist_dir
            return pool.submit(run, arguments.task, arguments.steps, name, rate, seed, *common)

        searches = {
            submit(name, rate, first): name
            for name in arguments.contestants
            for rate in arguments.rates or CONTESTANTS[name].rates
        }
        bar.total = len(searches) + len(others) * len(arguments.contestants)
        waiting = dict.fromkeys(searches)
        left = {
            name: sum(found == name for found in searches.values())
            for name in arguments.contestants
        }
        while waiting:
            done, _ = concurrent.futures.wait(
                waiting, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                del waiting[future]
                future.result()
                bar.update()
                name = searches.get(future)
                if name is None:
                    continue
                left[name] -= 1
                if left[name] == 0:
                    rate = best_rate(own(read(arguments), name), first)
                    if rate is None:
                        bar.total -= len(others)
                        continue
                    waiting |= dict.fromkeys(submit(name, rate, seed) for seed in others)


def own(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [record for record in records if record["contestant"] == name]


def read(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every record of the task and this number of steps, those of earlier calls included."""
    folder = arguments.output / f"{arguments.task}-{arguments.steps}"
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), default="patches8")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), help="default: all")
    parser.add_argument("--rates", type=float, nargs="+", help="default: each contestant's grid")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument(
        "--quick", action="store_true", help="a look: 50 steps, two rates, one seed"
    )
    parser.add_argument("--table", action="store_true", help="from the runs that are there")
    parser.add_argument("--mnist-dir", type=Path, help="folder of MNIST's IDX files")
    parser.add_argument("--output", type=Path, default=Path("results/learning"))
    arguments = parser.parse_args()
    if arguments.task == "mnist" and arguments.mnist_dir is None and not arguments.table:
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
    if not arguments.table:
        grid(arguments)
    records = read(arguments)
    if not records:
        raise SystemExit(f"no runs of {arguments.task}, {arguments.steps} steps: leave out --table")
    stem = arguments.output / f"{arguments.task}-{arguments.steps}"
    text = summary(records)
    stem.with_suffix(".md").write_text(text)
    print(text)
    curves(stem.with_suffix(".png"), records)
    print(f"figure: {stem.with_suffix('.png')}")


if __name__ == "__main__":
    main()
