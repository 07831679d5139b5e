"""Two-dimensional densities (paper, Section 4.2, Appendix G, Figure 5).

    python examples/toy_density.py --target checkerboard --preset quick
    python examples/toy_density.py --all --preset paper --compare --workers 2

Trains a Bent-stacked P4Inv flow on each target, with --compare also the RealNVP of the same size
and with --tuned the same stack beyond the paper's recipe, and writes figures, a table and the
numbers. A run that was interrupted continues where it stopped; --figures only draws.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from experiment import Record, cells, command_line, in_processes, kept, publish, table, there
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from toy_targets import TARGETS, Target

from p4flows import InvertibleMatrix, MergeHook, bent_stacked_flow, realnvp_flow
from p4flows.lightning import fit

EVALUATION_SAMPLES = 100_000
# A sample counts as leaked where the target's density is lower than at this share of its own
# samples; for the uniform checkerboard that is everything outside of the squares.
LEAKAGE_QUANTILE = 1e-3

Picture = tuple[str, Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True)
class Preset:
    """Length of a training run; the learning rate is halved after every epoch."""

    epochs: int
    steps_per_epoch: int
    batch: int = 200
    learning_rate: float = 5e-3

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


PRESETS = {"quick": Preset(8, 2_500, learning_rate=1e-2), "paper": Preset(8, 20_000)}


@dataclasses.dataclass(frozen=True)
class Model:
    """A flow of about 1,200 parameters, how often its matrices merge, and its own schedule if any.

    A learning rate of its own goes down to zero on a cosine.
    """

    title: str
    flow: Callable[[], nn.Module]
    every: int | None = None
    learning_rate: float | None = None


def realnvp() -> nn.Module:
    return realnvp_flow(2, 5, hidden=(6, 6), swap="permutation", shift_activation=nn.Tanh)


MODELS = {
    "realnvp": Model("RealNVP", realnvp),
    "p4inv": Model("P4Inv", lambda: bent_stacked_flow(2, 100, paper=True), every=10),
    "tuned": Model(
        "P4Inv, tuned", lambda: bent_stacked_flow(2, 100, paper=True), every=200, learning_rate=1e-2
    ),
}


def train(
    target: Target, model: Model, preset: Preset, seed: int, checkpoint: Path, progress: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Train one flow on one target, or continue from its checkpoint; the flow and its record."""
    torch.manual_seed(seed)
    flow = model.flow()
    hook: MergeHook | bool = False
    if model.every is not None:
        # N_force = 10 and N_correct = 50, as by default.
        hook = MergeHook(flow, every=model.every)

    def halved(optimizer: Optimizer, steps: int) -> LRScheduler:
        return StepLR(optimizer, preset.steps_per_epoch, gamma=0.5)

    flow, result = fit(
        flow,
        lambda generator: target.sample(preset.batch, generator),
        max_steps=preset.steps,
        steps_per_epoch=preset.steps_per_epoch,
        learning_rate=model.learning_rate or preset.learning_rate,
        schedule=halved if model.learning_rate is None else "cosine",
        hook=hook,
        checkpoint=checkpoint,
        checkpoint_every=2_000,
        seed=seed,
        progress=progress,
    )
    record = {
        "target": target.name,
        "model": model.title,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "steps": preset.steps,
        "seconds": round(result.seconds, 1),
        "merges": result.merges,
    }
    return flow, record


@torch.no_grad()
def evaluate(flow: nn.Module, target: Target, seed: int) -> dict[str, Any]:
    """Figures of merit of a trained flow, on samples that it was not trained on."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    data = target.sample(EVALUATION_SAMPLES, generator)
    torch.manual_seed(seed + 1)
    samples = flow.sample(EVALUATION_SAMPLES)
    log_q = flow.log_prob(data).double()
    numbers: dict[str, Any] = {"nll_nats": -log_q.mean().item()}
    if target.has_log_density:
        log_p = target.log_density(data).double()
        difference = log_p - log_q
        numbers["kl_nats"] = difference.mean().item()
        numbers["kl_standard_error"] = (difference.std() / math.sqrt(len(data))).item()
        level = torch.quantile(log_p, LEAKAGE_QUANTILE) - 1e-6
        numbers["leakage"] = (target.log_density(samples) < level).double().mean().item()
    numbers["energy_distance"] = energy_distance(samples, data)
    numbers["energy_distance_of_data"] = energy_distance(
        target.sample(EVALUATION_SAMPLES, generator), data
    )
    noise, _ = flow._transform(data)
    numbers["round_trip_error"] = (flow._transform.inverse(noise)[0] - data).abs().max().item()
    matrices = [module for module in flow.modules() if isinstance(module, InvertibleMatrix)]
    if matrices:
        errors = [matrix.error().worst() for matrix in matrices]
        numbers["inverse_error"] = max(error.right.item() for error in errors)
        numbers["logabsdet_error"] = max(error.logabsdet.item() for error in errors)
    return numbers


def energy_distance(first: Tensor, second: Tensor, rows: int = 10_000) -> float:
    """2 E|X − Y| − E|X − X'| − E|Y − Y'| of the first rows: zero where two samples agree."""
    rows = min(rows, len(first), len(second))
    x, y = first[:rows].double(), second[:rows].double()
    # The mean over pairs of different rows: a row has distance zero to itself.
    unbiased = rows / (rows - 1)
    across = torch.cdist(x, y).mean()
    within = torch.cdist(x, x).mean() + torch.cdist(y, y).mean()
    return (2.0 * across - unbiased * within).item()


def record_file(target: str, model: str, preset: str, seed: int, output: Path) -> Path:
    return output / f"{target}-{model}-{preset}-{seed}.json"


def run(
    name: str, model: str, preset: str, seed: int, output: Path, progress: bool = True
) -> Record:
    """Train and evaluate one model on one target; what is drawn of it is kept with its record."""
    target, file = TARGETS[name], record_file(name, model, preset, seed, output)

    def make() -> Record:
        checkpoint = file.with_suffix("")
        flow, record = train(target, MODELS[model], PRESETS[preset], seed, checkpoint, progress)
        np.savez(file.with_suffix(".npz"), **drawn(flow, target, seed))
        return record | {"preset": preset, **evaluate(flow, target, seed)}

    return kept(file, make)


@torch.no_grad()
def drawn(flow: nn.Module, target: Target, seed: int) -> dict[str, np.ndarray]:
    """Samples of a trained flow and its log-density on a grid."""
    torch.manual_seed(seed)
    samples, log_density = flow.sample(EVALUATION_SAMPLES), flow.log_prob(grid(target.limits))
    return {"samples": samples.numpy(), "log_density": log_density.numpy()}


def pictures(records: dict[Path, Record]) -> dict[str, list[Picture]]:
    """Of each target: title, samples and log-density on a grid of itself and of each model."""
    rows: dict[str, list[Picture]] = {}
    for file, record in records.items():
        if record["target"] not in rows:
            target = TARGETS[record["target"]]
            samples = target.sample(
                EVALUATION_SAMPLES, torch.Generator().manual_seed(record["seed"])
            )
            known = target.has_log_density
            density = target.log_density(grid(target.limits)) if known else None
            rows[record["target"]] = [("Truth", samples, density)]
        found = {name: torch.from_numpy(x) for name, x in np.load(file.with_suffix(".npz")).items()}
        rows[record["target"]].append((record["model"], found["samples"], found["log_density"]))
    return rows


def grid(limits: float, points: int = 400) -> Tensor:
    """Points of a square grid over [−limits, limits]², shape (points², 2), row by row."""
    axis = torch.linspace(-limits, limits, points)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2)


def draw_samples(axes: Any, samples: Tensor, limits: float) -> None:
    """A two-dimensional histogram."""
    extent = [[-limits, limits], [-limits, limits]]
    axes.hist2d(*samples.T.numpy(), bins=200, range=extent, cmap="viridis")


def draw_density(axes: Any, log_density: Tensor, limits: float) -> None:
    """A density on the points of `grid`."""
    points = math.isqrt(len(log_density))
    image = log_density.exp().reshape(points, points)
    axes.imshow(
        image.numpy(), origin="lower", extent=[-limits, limits, -limits, limits], cmap="viridis"
    )


def figure_of_one(target: Target, columns: list[Picture]) -> Any:
    """Samples above, densities below; one column for the truth and each model."""
    figure, axes = plt.subplots(
        2, len(columns), figsize=(3.2 * len(columns), 6.4), squeeze=False, layout="constrained"
    )
    for column, (title, samples, density) in enumerate(columns):
        draw_samples(axes[0, column], samples, target.limits)
        axes[0, column].set_title(f"{title}: samples")
        axes[1, column].set_title(f"{title}: density")
        if density is not None:
            draw_density(axes[1, column], density, target.limits)
        else:
            axes[1, column].text(0.5, 0.5, "not known", ha="center", va="center")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], aspect="equal")
    return figure


def figure_of_all(rows: dict[str, list[Picture]]) -> Any:
    """As Figure 5: one row of samples for each target."""
    titles = list(dict.fromkeys(title for row in rows.values() for title, *_ in row))
    size = (2 * len(titles), 2 * len(rows))
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=size, squeeze=False, layout="constrained"
    )
    for axes_row, (name, row) in zip(axes, rows.items(), strict=True):
        axes_row[0].set_ylabel(name.replace("_", " "))
        for title, samples, _ in row:
            draw_samples(axes_row[titles.index(title)], samples, TARGETS[name].limits)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], aspect="equal")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    return figure


COLUMNS = {
    "target": lambda r: r["target"],
    "model": lambda r: r["model"],
    "parameters": lambda r: str(r["parameters"]),
    "KL (nats)": lambda r: f"{r['kl_nats']:.4f}",
    "±": lambda r: f"{r['kl_standard_error']:.4f}",
    "NLL (nats)": lambda r: f"{r['nll_nats']:.4f}",
    "leakage": lambda r: f"{r['leakage']:.4f}",
    "energy distance (of data)": lambda r: (
        f"{r['energy_distance']:.1e} ({r['energy_distance_of_data']:.1e})"
    ),
    "round trip": lambda r: f"{r['round_trip_error']:.1e}",
    "‖AA⁻¹−I‖": lambda r: f"{r['inverse_error']:.1e}",
    "log-det error": lambda r: f"{r['logabsdet_error']:.1e}",
    "seconds": lambda r: f"{r['seconds']:.0f}",
}


def main() -> None:
    """Train what is missing, then write figures and table of what is there."""
    parser = command_line(__doc__, "results/toy_density", PRESETS)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--target", choices=sorted(TARGETS), default="checkerboard")
    chosen.add_argument("--all", action="store_true", help="every target, as in Figure 5")
    parser.add_argument("--compare", action="store_true", help="train the RealNVP baseline too")
    parser.add_argument("--tuned", action="store_true", help="train P4Inv by a better recipe too")
    arguments = parser.parse_args()
    output, preset, seed = arguments.output, arguments.preset, arguments.seed
    targets = sorted(TARGETS) if arguments.all else [arguments.target]
    models = ["realnvp"] * arguments.compare + ["p4inv"] + ["tuned"] * arguments.tuned
    jobs = [(target, model, preset, seed, output) for target in targets for model in models]
    if not arguments.figures:
        in_processes(run, jobs, arguments.workers)

    torch.set_num_threads(1)
    found = there((record_file(*job) for job in jobs), beside=".npz")
    rows = pictures(found)
    drawings = {name: figure_of_one(TARGETS[name], row) for name, row in rows.items()}
    if arguments.all:
        drawings["all"] = figure_of_all(rows)
    for name, drawing in drawings.items():
        drawing.savefig(output / f"{name}-{preset}.png", dpi=150)
        print(f"figure: {output / f'{name}-{preset}.png'}")
    records = list(found.values())
    numbers = table(list(COLUMNS), [cells(record, COLUMNS) for record in records], text=2)
    name = "all" if arguments.all else arguments.target
    publish(output / f"{name}-{preset}.md", records, numbers)


if __name__ == "__main__":
    main()
