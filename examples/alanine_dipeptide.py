"""Boltzmann generators of alanine dipeptide (paper, Section 4.3, Appendix H, Figure 6).

    python examples/alanine_dipeptide.py --preset quick
    python examples/alanine_dipeptide.py --preset paper
    python examples/alanine_dipeptide.py --preset decay

Simulates the molecule, trains RealNVP flows with swaps and with P4Inv swaps, first by likelihood,
then by likelihood and energy, and writes a figure, a table, the numbers and sampled structures as a
trajectory. Simulation and training continue where an interrupted run stopped.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from nflows.flows.base import Flow
from torch import Tensor

from p4flows import InvertibleMatrix, MergeHook, fit, realnvp_flow
from p4flows.molecules import (
    LangevinDynamics,
    MixedCoordinateTransform,
    OpenMMEnergy,
    alanine_dipeptide,
    effective_sample_size,
    free_energy_difference,
    mixed_loss,
    phi_psi,
    sample_with_weights,
    simulate,
    state_statistics,
)

TEMPERATURE = 600.0  # K
BATCH = 256
NOISE = 0.004  # nm
SAMPLES = 20_000
SAVED_STRUCTURES = 1_000
BOOTSTRAPS = 200
# The two metastable states that are slowest to interchange, by φ in degrees.
LEFT, RIGHT = (-180.0, -40.0), (20.0, 110.0)


@dataclasses.dataclass(frozen=True)
class Preset:
    """Amount of data and length of training; Appendix H in `paper`."""

    replicas: int
    frames: int
    steps: int
    mixed_steps: int
    decay: bool = False


PRESETS = {
    "quick": Preset(4, 25_000, 3_000, 200, decay=True),
    "paper": Preset(10, 50_000, 40_000, 2_000),
    "decay": Preset(10, 50_000, 40_000, 2_000, decay=True),
}
MODELS = {"rnvp": "RNVP", "p4inv": "P4Inv"}


class Problem:
    """The molecule, its data (the last replica is held out) and the coordinates of the flows."""

    def __init__(self, preset: Preset, output: Path, workers: int, progress: bool) -> None:
        self.molecule = alanine_dipeptide()
        self.energy = OpenMMEnergy(self.molecule.system, TEMPERATURE)
        replicas = simulate(
            self.molecule,
            output / "md",
            dynamics=LangevinDynamics(temperature=TEMPERATURE),
            replicas=preset.replicas,
            frames=preset.frames,
            workers=workers,
            progress=progress,
        )
        self.replicas = torch.from_numpy(replicas)
        frames = self.replicas[:-1].flatten(0, 1)
        self.coordinates = MixedCoordinateTransform(frames, self.molecule.topology)
        self.features = self.coordinates(frames)[0]
        # For all that is compared with samples: frames of all replicas, evenly spaced.
        everything = self.replicas.flatten(0, 1)
        self.reference = everything[:: max(1, len(everything) // SAMPLES)][:SAMPLES]
        self.reference_energies = self.energy(self.reference).double()

    def batch(self, generator: torch.Generator) -> Tensor:
        return self.features[torch.randint(len(self.features), (BATCH,), generator=generator)]

    def torsions(self, positions: Tensor) -> np.ndarray:
        """φ and ψ in degrees, shape (frames, 2)."""
        return np.degrees(phi_psi(self.molecule.trajectory(positions.numpy())))


def states(torsions: np.ndarray) -> np.ndarray:
    """0 for the left, 1 for the right, −1 for what is between."""
    phi = torsions[..., 0]
    left = (LEFT[0] <= phi) & (phi < LEFT[1])
    right = (RIGHT[0] <= phi) & (phi < RIGHT[1])
    return np.where(left, 0, np.where(right, 1, -1))


def train(
    problem: Problem, model: str, preset: Preset, seed: int, stem: Path, progress: bool
) -> tuple[Flow, dict[str, Any]]:
    """Both stages of training, each continued from its checkpoint; the flow and its record."""
    torch.manual_seed(seed)
    flow = realnvp_flow(60, 25, swap="p4" if model == "p4inv" else "permutation")
    highest_seen = problem.reference_energies.max().item()
    capped = OpenMMEnergy(problem.molecule.system, TEMPERATURE, cap=(highest_seen + 10.0, 1e20))
    record: dict[str, Any] = {
        "model": MODELS[model],
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
    }
    stages = (
        ("likelihood", preset.steps, 1e-3, {}),
        ("mixed", preset.mixed_steps, 1e-5, {"loss": mixed_loss(problem.coordinates, capped)}),
    )
    for stage, steps, learning_rate, options in stages:
        optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate, fused=True)
        hook = None
        if model == "p4inv":
            hook = MergeHook(flow, optimizer, every=100, force_every=10, correct_every=50)
        scheduler = None
        if preset.decay and stage == "likelihood":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        result = fit(
            flow,
            problem.batch,
            steps=steps,
            optimizer=optimizer,
            scheduler=scheduler,
            hook=hook,
            generator=torch.Generator().manual_seed(seed),
            checkpoint=stem.with_name(f"{stem.name}-{stage}.pt"),
            resume=True,
            progress=progress,
            **options,
        )
        if hook is not None:
            hook.remove()
        record[stage] = {
            "steps": steps,
            "learning_rate": learning_rate,
            "seconds_per_step": result.seconds / steps,
            "merges": dict(hook.stats) if hook is not None else None,
            **evaluate(problem, flow, seed),
        }
    return flow.eval(), record


@torch.no_grad()
def evaluate(problem: Problem, flow: Flow, seed: int) -> dict[str, Any]:
    """Figures of merit of a flow, on samples of its own and on the replica that it has not seen."""
    was_training = flow.training
    flow.eval()
    torch.manual_seed(seed + 1)
    positions, energies, log_weights = sample_with_weights(
        flow, problem.coordinates, problem.energy, SAMPLES
    )
    numbers = energy_numbers(energies.double(), problem.reference_energies, seed)
    torsions, expected = problem.torsions(positions), problem.torsions(problem.reference)
    for index, name in enumerate(("phi", "psi")):
        numbers[f"kl_{name}"] = kl_of_histograms(expected[:, index], torsions[:, index])
    numbers["effective_sample_size"] = effective_sample_size(log_weights)
    label = torch.from_numpy(states(torsions))
    numbers["free_energy_kt"] = free_energy_difference(log_weights, label == 0, label == 1)
    held_out = problem.replicas[-1]
    features = problem.coordinates(held_out)[0]
    numbers["nll"] = -flow.log_prob(features).mean().item()
    noise, _ = flow._transform(features[:SAMPLES])
    back = problem.coordinates.inverse(flow._transform.inverse(noise)[0])[0]
    numbers["round_trip_nm"] = (
        (back - problem.coordinates.inverse(features[:SAMPLES])[0]).abs().max().item()
    )
    errors = [inverse_error(m) for m in flow.modules() if isinstance(m, InvertibleMatrix)]
    numbers["inverse_error"] = max(errors, default=None)
    flow.train(was_training)
    return numbers


def energy_numbers(energies: Tensor, reference: Tensor, seed: int) -> dict[str, Any]:
    """Shifts of mean and median in k_BT with bootstrap errors, and the low-energy fraction."""
    generator = torch.Generator().manual_seed(seed)
    numbers: dict[str, Any] = {"low_energy_fraction": (energies < reference.max()).double().mean()}
    low = energies[energies < reference.max()]
    for name, statistic, values in (
        ("median", torch.median, energies),
        ("mean", torch.mean, energies),
        ("low_energy_mean", torch.mean, low),
    ):
        resampled = torch.stack(
            [
                statistic(bootstrap(values, generator)) - statistic(bootstrap(reference, generator))
                for _ in range(BOOTSTRAPS)
            ]
        )
        numbers[f"{name}_shift"] = (statistic(values) - statistic(reference)).item()
        numbers[f"{name}_shift_error"] = resampled.std().item()
    numbers["low_energy_fraction"] = numbers["low_energy_fraction"].item()
    return numbers


def bootstrap(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randint(len(values), (len(values),), generator=generator)]


def kl_of_histograms(expected: np.ndarray, found: np.ndarray, bins: int = 72) -> float:
    """KL divergence in nats of the found distribution of an angle from the expected one."""
    # Half a count everywhere, so that an empty bin is not infinitely bad.
    counts = [np.histogram(a, bins, (-180.0, 180.0))[0] + 0.5 for a in (expected, found)]
    p, q = (c / c.sum() for c in counts)
    return float((p * np.log(p / q)).sum())


def inverse_error(matrix: InvertibleMatrix) -> float:
    """Largest entry of |A A⁻¹ − I| for the stored inverse, in float64."""
    product = matrix.frozen.double() @ matrix.inverse_frozen.double()
    return (product - torch.eye(matrix.size, dtype=torch.float64)).abs().max().item()


def run(
    model: str, preset_name: str, seed: int, output: Path, workers: int, progress: bool
) -> dict[str, Any]:
    """Train one model and write its samples; record and samples are kept beside the checkpoints."""
    torch.set_num_threads(1)
    stem = output / f"{model}-{preset_name}-{seed}"
    record_file = stem.with_suffix(".json")
    if record_file.exists():
        return json.loads(record_file.read_text())
    preset = PRESETS[preset_name]
    problem = Problem(preset, output, workers, progress)
    flow, record = train(problem, model, preset, seed, stem, progress)
    torch.manual_seed(seed)
    positions, energies, _ = sample_with_weights(flow, problem.coordinates, problem.energy, SAMPLES)
    np.savez(
        stem.with_suffix(".npz"), energies=energies.numpy(), torsions=problem.torsions(positions)
    )
    structures = problem.molecule.trajectory(positions[:SAVED_STRUCTURES].numpy())
    structures[0].save_pdb(str(stem.with_suffix(".pdb")))
    structures.save_dcd(str(stem.with_suffix(".dcd")))
    record_file.write_text(json.dumps(record, indent=2) + "\n")
    return record


def data_record(problem: Problem, seed: int) -> dict[str, Any]:
    """What the simulation itself has to say, for comparison."""
    labels = states(problem.torsions(problem.replicas.flatten(0, 1)))
    statistics = state_statistics(labels.reshape(problem.replicas.shape[:2]))
    left, right = statistics.populations
    relative = statistics.errors / statistics.populations
    torch.manual_seed(seed)
    noisy = problem.reference + NOISE * torch.randn_like(problem.reference)
    return {
        "replicas": len(problem.replicas),
        "frames": len(labels),
        "transitions": statistics.transitions,
        "populations": statistics.populations.tolist(),
        "population_errors": statistics.errors.tolist(),
        "free_energy_kt": math.log(left / right),
        "free_energy_error": float(np.hypot(*relative)),
        "noise": energy_numbers(problem.energy(noisy).double(), problem.reference_energies, seed),
    }


def figure(problem: Problem, samples: dict[str, Any], seed: int) -> Any:
    """As Figure 6: energies as violins on the left, φ and ψ on the right."""
    torch.manual_seed(seed)
    noisy = problem.reference + NOISE * torch.randn_like(problem.reference)
    columns = {
        "MD": problem.reference_energies.numpy(),
        f"MD + {NOISE} nm": problem.energy(noisy).numpy(),
        **{title: found["energies"] for title, found in samples.items()},
    }
    maps = {"MD": problem.torsions(problem.reference)}
    maps |= {title: found["torsions"] for title, found in samples.items()}
    drawn, axes = plt.subplots(
        1,
        1 + len(maps),
        figsize=(4.2 + 3.2 * len(maps), 3.6),
        width_ratios=[1.4, *[1] * len(maps)],
        layout="constrained",
    )
    highest = columns["MD"].max()
    window = (columns["MD"].min() - 10.0, 3.0 * highest)
    # A violin of unbounded energies would be a line: what is above the window is left out.
    parts = axes[0].violinplot(
        [values[values < window[1]] for values in columns.values()],
        showmedians=True,
        showextrema=False,
        widths=0.9,
    )
    for body, color in zip(parts["bodies"], ("C0", "C1", "C2", "C3"), strict=False):
        body.set(facecolor=color, alpha=0.6)
    axes[0].axhline(highest, color="grey", linestyle="--", linewidth=0.8)
    for index, values in enumerate(columns.values(), start=1):
        share = f"{(values <= highest).mean():.1%}"
        axes[0].text(index, window[0], share, ha="center", va="bottom", fontsize=8)
    axes[0].set_xticks(range(1, len(columns) + 1), columns, fontsize=8)
    axes[0].set(ylabel="u / k$_B$T", ylim=window, title="energy; share below MD's highest")
    for axis, (title, torsions) in zip(axes[1:], maps.items(), strict=True):
        extent = [[-180, 180], [-180, 180]]
        counts, *_ = np.histogram2d(*torsions.T, bins=72, range=extent)
        free_energy = -np.log(np.where(counts > 0, counts, np.nan) / counts.max())
        axis.imshow(
            free_energy.T, origin="lower", extent=[-180, 180, -180, 180], cmap="viridis_r", vmax=7
        )
        axis.set(title=title, xlabel="φ", xticks=[-180, -90, 0, 90, 180], yticks=[-180, 0, 180])
    axes[1].set_ylabel("ψ")
    return drawn


COLUMNS = {
    "median shift (k_BT)": lambda r: f"{r['median_shift']:+.2f} ± {r['median_shift_error']:.2f}",
    "mean shift": lambda r: f"{r['mean_shift']:+.3g} ± {r['mean_shift_error']:.1g}",
    "mean shift below MD's highest": lambda r: (
        f"{r['low_energy_mean_shift']:+.2f} ± {r['low_energy_mean_shift_error']:.2f}"
    ),
    "low energy": lambda r: f"{r['low_energy_fraction']:.1%}",
    "NLL (nats)": lambda r: f"{r['nll']:.2f}",
    "KL φ": lambda r: f"{r['kl_phi']:.4f}",
    "KL ψ": lambda r: f"{r['kl_psi']:.4f}",
    "ESS": lambda r: f"{r['effective_sample_size']:.1%}",
    "ΔF (k_BT)": lambda r: f"{r['free_energy_kt']:.2f}",
    "round trip (nm)": lambda r: f"{r['round_trip_nm']:.1e}",
    "max AA⁻¹ − I": lambda r: f"{r['inverse_error']:.1e}",
    "s/step": lambda r: f"{r['seconds_per_step']:.3f}",
}


def table(data: dict[str, Any], records: list[dict[str, Any]], command: str) -> str:
    """All numbers as Markdown."""
    rows = [("MD + noise", "", data["noise"])]
    for record in records:
        rows += [(record["model"], stage, record[stage]) for stage in ("likelihood", "mixed")]
    lines = [
        f"`{command}`",
        "",
        f"{data['replicas']} replicas, {data['frames']} frames at {TEMPERATURE:g} K, "
        f"{data['transitions']} transitions between φ < 0 and φ > 0; ΔF of the simulation "
        f"{data['free_energy_kt']:.2f} ± {data['free_energy_error']:.2f} k_BT.",
        "",
        "| | after | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    for title, stage, record in rows:
        cells = []
        for form in COLUMNS.values():
            try:
                cells.append(form(record))
            except (KeyError, TypeError):
                cells.append("–")
        lines.append(f"| {title} | {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="quick")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--output", type=Path, default=Path("results/alanine_dipeptide"))
    return parser.parse_args()


def main() -> None:
    """Simulate, train, then write figure, table, JSON and trajectories."""
    arguments = parse_arguments()
    output, seed, workers = arguments.output, arguments.seed, arguments.workers
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    problem = Problem(PRESETS[arguments.preset], output, workers, progress=True)
    data = data_record(problem, seed)
    print(
        f"{data['frames']} frames, {data['transitions']} transitions; share of φ > 0 "
        f"{data['populations'][1]:.4f} ± {data['population_errors'][1]:.4f}"
    )
    # Processes, because flows of this size gain little from a second thread.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [
            pool.submit(run, model, arguments.preset, seed, output, workers, True)
            for model in arguments.models
        ]
        records = [future.result() for future in futures]

    stem = output / f"alanine_dipeptide-{arguments.preset}-{seed}"
    samples = {
        MODELS[model]: dict(np.load(output / f"{model}-{arguments.preset}-{seed}.npz"))
        for model in arguments.models
    }
    figure(problem, samples, seed).savefig(stem.with_suffix(".png"), dpi=150)
    command = f"python examples/alanine_dipeptide.py --preset {arguments.preset} --seed {seed}"
    stem.with_suffix(".md").write_text(table(data, records, command))
    stem.with_suffix(".json").write_text(
        json.dumps({"data": data, "models": records}, indent=2) + "\n"
    )
    print(table(data, records, command))
    print(f"figure: {stem.with_suffix('.png')}")


if __name__ == "__main__":
    main()
