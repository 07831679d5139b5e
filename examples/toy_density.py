"""Two-dimensional densities (paper, Section 4.2, Appendix G, Figure 5).

    python examples/toy_density.py --target checkerboard --preset quick
    python examples/toy_density.py --all --preset paper --compare --workers 2

Trains a Bent-stacked P4Inv flow on each target, with --compare also the RealNVP of the same size
and with --tuned the same stack beyond the paper's recipe, and writes a figure, a table and the
numbers. A run that was interrupted continues where it stopped.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from p4flows import InvertibleMatrix, MergeHook, bent_stacked_flow, fit, realnvp_flow
from p4flows.toy import TARGETS, Target

EVALUATION_SAMPLES = 100_000
# A sample counts as leaked where the target's density is lower than at this share of its own
# samples; for the uniform checkerboard that is everything outside of the squares.
LEAKAGE_QUANTILE = 1e-3


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
    "p4inv": Model("P4Inv", lambda: bent_stacked_flow(2, 100), every=10),
    "tuned": Model(
        "P4Inv, tuned", lambda: bent_stacked_flow(2, 100), every=200, learning_rate=1e-2
    ),
}


def train(
    target: Target, model: Model, preset: Preset, seed: int, checkpoint: Path, progress: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Train one flow on one target, or continue from its checkpoint; the flow and its record."""
    torch.manual_seed(seed)
    flow = model.flow()
    # Fused, because a step of these flows takes less than a loop over their parameters.
    learning_rate = model.learning_rate or preset.learning_rate
    optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate, fused=True)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if model.learning_rate is None:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, preset.steps_per_epoch, gamma=0.5)
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, preset.steps)
    hook = None
    if model.every is not None:
        # N_force = 10 and N_correct = 50, as by default.
        hook = MergeHook(flow, optimizer, every=model.every, restart="carry", draw="normal")
    result = fit(
        flow,
        lambda generator: target.sample(preset.batch, generator),
        steps=preset.steps,
        optimizer=optimizer,
        scheduler=scheduler,
        hook=hook,
        generator=torch.Generator().manual_seed(seed),
        checkpoint=checkpoint,
        checkpoint_every=2_000,
        resume=True,
        progress=progress,
    )
    record = {
        "target": target.name,
        "model": model.title,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "steps": preset.steps,
        "seconds": round(result.seconds, 1),
        "merges": dict(hook.stats) if hook is not None else None,
    }
    return flow.eval(), record


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


def run(
    target_name: str, model_name: str, preset_name: str, seed: int, output: Path, progress: bool
) -> dict[str, Any]:
    """Train and evaluate one model on one target; its record is kept beside the checkpoint."""
    torch.set_num_threads(1)
    target, model, preset = TARGETS[target_name], MODELS[model_name], PRESETS[preset_name]
    stem = output / f"{target_name}-{model_name}-{preset_name}-{seed}"
    record_file = stem.with_suffix(".json")
    flow, record = train(target, model, preset, seed, stem.with_suffix(".pt"), progress)
    if record_file.exists():
        return json.loads(record_file.read_text())
    record |= {"preset": preset_name, **evaluate(flow, target, seed)}
    record_file.write_text(json.dumps(record, indent=2) + "\n")
    return record


@torch.no_grad()
def pictures(
    target_name: str, model_names: list[str], preset_name: str, seed: int, output: Path
) -> list[tuple[str, Tensor, Tensor | None]]:
    """Title, samples and log-density on a grid of the target and of each trained model."""
    target, preset = TARGETS[target_name], PRESETS[preset_name]
    x = grid(target.limits)
    generator = torch.Generator().manual_seed(seed)
    density = target.log_density(x) if target.has_log_density else None
    rows = [("Truth", target.sample(EVALUATION_SAMPLES, generator), density)]
    for name in model_names:
        checkpoint = output / f"{target_name}-{name}-{preset_name}-{seed}.pt"
        flow, _ = train(target, MODELS[name], preset, seed, checkpoint, progress=False)
        torch.manual_seed(seed)
        rows.append((MODELS[name].title, flow.sample(EVALUATION_SAMPLES), flow.log_prob(x)))
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


def figure_of_one(target: Target, columns: list[tuple[str, Tensor, Tensor | None]]) -> Any:
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


def figure_of_all(rows: dict[str, list[tuple[str, Tensor, Tensor | None]]]) -> Any:
    """As Figure 5: one row of samples for each target."""
    columns = len(next(iter(rows.values())))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2 * columns, 2 * len(rows)), layout="constrained"
    )
    for axes_row, (name, row) in zip(axes, rows.items(), strict=True):
        axes_row[0].set_ylabel(name.replace("_", " "))
        for axis, (_, samples, _) in zip(axes_row, row, strict=True):
            draw_samples(axis, samples, TARGETS[name].limits)
            axis.set(xticks=[], yticks=[], aspect="equal")
    for axis, (title, *_) in zip(axes[0], next(iter(rows.values())), strict=True):
        axis.set_title(title)
    return figure


def table(records: list[dict[str, Any]], command: str) -> str:
    """The records as a Markdown table."""

    def cell(record: dict[str, Any], key: str, form: str) -> str:
        return format(record[key], form) if record.get(key) is not None else "–"

    lines = [
        f"`{command}`",
        "",
        "| target | model | parameters | KL (nats) | ± | NLL (nats) | leakage | energy distance "
        "(of data) | round trip | ‖AA⁻¹−I‖ | log-det error | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        lines.append(
            "| "
            + " | ".join(
                [
                    record["target"],
                    record["model"],
                    str(record["parameters"]),
                    cell(record, "kl_nats", ".4f"),
                    cell(record, "kl_standard_error", ".4f"),
                    cell(record, "nll_nats", ".4f"),
                    cell(record, "leakage", ".4f"),
                    f"{record['energy_distance']:.1e} ({record['energy_distance_of_data']:.1e})",
                    cell(record, "round_trip_error", ".1e"),
                    cell(record, "inverse_error", ".1e"),
                    cell(record, "logabsdet_error", ".1e"),
                    cell(record, "seconds", ".0f"),
                ]
            )
            + " |"
        )
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--target", choices=sorted(TARGETS), default="checkerboard")
    chosen.add_argument("--all", action="store_true", help="every target, as in Figure 5")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="quick")
    parser.add_argument("--compare", action="store_true", help="train the RealNVP baseline too")
    parser.add_argument("--tuned", action="store_true", help="train P4Inv by a better recipe too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--output", type=Path, default=Path("results/toy_density"))
    return parser.parse_args()


def main() -> None:
    """Train what is asked for, then write figure, table and JSON."""
    arguments = parse_arguments()
    output, preset, seed = arguments.output, arguments.preset, arguments.seed
    output.mkdir(parents=True, exist_ok=True)
    targets = sorted(TARGETS) if arguments.all else [arguments.target]
    models = ["realnvp"] * arguments.compare + ["p4inv"] + ["tuned"] * arguments.tuned
    jobs = [(target, model) for target in targets for model in models]

    # Processes, because a flow of two dimensions cannot keep more than one core busy.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        futures = [pool.submit(run, *job, preset, seed, output, True) for job in jobs]
        records = [future.result() for future in futures]

    torch.set_num_threads(1)
    rows = {name: pictures(name, models, preset, seed, output) for name in targets}
    name = "all" if arguments.all else arguments.target
    figure = figure_of_all(rows) if arguments.all else figure_of_one(TARGETS[name], rows[name])
    stem = output / f"{name}-{preset}"
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    command = f"python examples/toy_density.py {'--all' if arguments.all else f'--target {name}'}"
    command += f" --preset {preset}{' --compare' if arguments.compare else ''}"
    command += f"{' --tuned' if arguments.tuned else ''} --seed {seed}"
    stem.with_suffix(".md").write_text(table(records, command))
    stem.with_suffix(".json").write_text(json.dumps(records, indent=2) + "\n")
    print(table(records, command))
    print(f"figure: {stem.with_suffix('.png')}")


if __name__ == "__main__":
    main()
