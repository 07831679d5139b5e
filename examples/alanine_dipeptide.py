"""Boltzmann generators of alanine dipeptide (paper, Section 4.3, Appendix H, Figure 6).

    python examples/alanine_dipeptide.py --preset quick
    python examples/alanine_dipeptide.py --preset paper
    python examples/alanine_dipeptide.py --preset beyond

Simulates the molecule, trains flows with swaps and with P4Inv layers in their place, first by
likelihood, then by likelihood and energy, and writes a figure, a table, the numbers and sampled
structures as a trajectory. Simulation and training continue where an interrupted run stopped;
--figures only draws.
"""

import argparse
import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from alanine_dipeptide_flows import MODELS
from alanine_dipeptide_report import NOISE, draw, energy_numbers, kl_of_histograms
from experiment import Record, command_line, in_processes, kept
from nflows.flows.base import Flow
from ramachandran import is_trans, states
from torch import Tensor

from p4flows import InvertibleMatrix, MergeHook
from p4flows.lightning import fit
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
SAMPLES = 20_000
SAVED_STRUCTURES = 1_000


@dataclasses.dataclass(frozen=True)
class Preset:
    """Amount of data, length of training and whether its rate decays to zero on a cosine."""

    replicas: int
    frames: int
    steps: int
    mixed_steps: int
    decay: bool
    models: tuple[str, ...]


PRESETS = {
    "quick": Preset(4, 25_000, 1_500, 100, True, tuple(MODELS)),
    # Appendix H.
    "paper": Preset(10, 50_000, 40_000, 2_000, False, ("rnvp", "p4inv")),
    "beyond": Preset(10, 50_000, 3_000, 300, True, ("spline", "spline-p4inv")),
}


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
        # At 600 K a peptide bond turns to cis once in some 10 ns and stays so for one: the data has
        # a few such visits at most, from which nothing can be learnt. They are left out.
        self.trans = torch.stack([is_trans(self.molecule, frames) for frames in self.replicas])
        frames = self.replicas[:-1][self.trans[:-1]]
        self.coordinates = MixedCoordinateTransform(frames, self.molecule.topology)
        self.features = self.coordinates(frames)[0]
        # For all that is compared with samples: frames of all replicas, evenly spaced.
        everything = self.replicas[self.trans]
        self.reference = everything[:: max(1, len(everything) // SAMPLES)][:SAMPLES]
        self.reference_energies = self.energy(self.reference).double()

    def batch(self, generator: torch.Generator) -> Tensor:
        return self.features[torch.randint(len(self.features), (BATCH,), generator=generator)]

    def noisy(self, seed: int) -> Tensor:
        """The reference frames with each coordinate perturbed by NOISE."""
        generator = torch.Generator().manual_seed(seed)
        return self.reference + NOISE * torch.randn(self.reference.shape, generator=generator)

    def torsions(self, positions: Tensor) -> np.ndarray:
        """φ and ψ in degrees, shape (frames, 2)."""
        return np.degrees(phi_psi(self.molecule.trajectory(positions.numpy())))


class Samples(NamedTuple):
    """Structures drawn from a flow."""

    positions: Tensor
    energies: Tensor
    torsions: np.ndarray

    def save(self, file: Path) -> None:
        """What is drawn of them."""
        np.savez(file, energies=self.energies.numpy(), torsions=self.torsions)


def train(
    problem: Problem, model: str, preset: Preset, seed: int, stem: Path, progress: bool
) -> tuple[dict[str, Any], Samples]:
    """Both stages of training, each continued from its checkpoint; the record, the last samples."""
    torch.manual_seed(seed)
    flow = MODELS[model].flow()
    matrices = [module for module in flow.modules() if isinstance(module, InvertibleMatrix)]
    highest_seen = problem.reference_energies.max().item()
    energy = OpenMMEnergy(problem.molecule.system, TEMPERATURE)
    mixed = mixed_loss(problem.coordinates, energy, cap=(highest_seen + 10.0, 1e20))
    record: dict[str, Any] = {
        "model": MODELS[model].title,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
    }
    stages = (
        ("likelihood", preset.steps, 1e-3, {}),
        ("mixed", preset.mixed_steps, 1e-5, {"loss": mixed}),
    )
    for stage, steps, learning_rate, options in stages:
        decays = preset.decay and stage == "likelihood"
        flow, result = fit(
            flow,
            problem.batch,
            max_steps=steps,
            learning_rate=learning_rate,
            schedule="cosine" if decays else None,
            hook=MergeHook.paper(flow, every=100) if matrices else False,
            checkpoint=stem.with_name(f"{stem.name}-{stage}"),
            seed=seed,
            progress=progress,
            **options,
        )
        numbers, samples = evaluate(problem, flow, seed)
        record[stage] = {
            "steps": steps,
            "learning_rate": learning_rate,
            "seconds_per_step": result.seconds / steps,
            "merges": result.merges,
            **numbers,
        }
    return record, samples


@torch.no_grad()
def evaluate(problem: Problem, flow: Flow, seed: int) -> tuple[dict[str, Any], Samples]:
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
    held_out = problem.replicas[-1][problem.trans[-1]]
    features = problem.coordinates(held_out)[0]
    numbers["nll"] = -flow.log_prob(features).mean().item()
    noise, _ = flow._transform(features[:SAMPLES])
    back = problem.coordinates.inverse(flow._transform.inverse(noise)[0])[0]
    numbers["round_trip_nm"] = (
        (back - problem.coordinates.inverse(features[:SAMPLES])[0]).abs().max().item()
    )
    errors = [
        module.error().worst().right.item()
        for module in flow.modules()
        if isinstance(module, InvertibleMatrix)
    ]
    numbers["inverse_error"] = max(errors, default=None)
    flow.train(was_training)
    return numbers, Samples(positions, energies, torsions)


def record_file(name: str, preset: str, seed: int, output: Path) -> Path:
    return output / f"{name}-{preset}-{seed}.json"


def run(
    model: str, preset_name: str, seed: int, output: Path, workers: int, progress: bool = True
) -> Record:
    """Train one model; its samples are kept beside record and checkpoints."""
    file, preset = record_file(model, preset_name, seed, output), PRESETS[preset_name]

    def make() -> Record:
        problem = Problem(preset, output, workers, progress)
        record, samples = train(problem, model, preset, seed, file.with_suffix(""), progress)
        samples.save(file.with_suffix(".npz"))
        structures = problem.molecule.trajectory(samples.positions[:SAVED_STRUCTURES].numpy())
        structures[0].save_pdb(str(file.with_suffix(".pdb")))
        structures.save_dcd(str(file.with_suffix(".dcd")))
        return record

    return kept(file, make)


def data_record(problem: Problem, seed: int, drawn: Path) -> Record:
    """What the simulation itself has to say, for comparison; what is drawn of it goes to a file."""
    labels = states(problem.torsions(problem.replicas.flatten(0, 1)))
    labels = np.where(problem.trans, labels.reshape(problem.trans.shape), -1)
    statistics = state_statistics(labels)
    left, right = statistics.populations
    relative = statistics.errors / statistics.populations
    noisy = problem.energy(problem.noisy(seed))
    np.savez(
        drawn,
        energies=problem.reference_energies.numpy(),
        noisy_energies=noisy.numpy(),
        torsions=problem.torsions(problem.reference),
    )
    return {
        "seed": seed,
        "temperature": TEMPERATURE,
        "replicas": len(problem.replicas),
        "frames": labels.size,
        "cis_share": 1.0 - problem.trans.double().mean().item(),
        "transitions": statistics.transitions,
        "populations": statistics.populations.tolist(),
        "population_errors": statistics.errors.tolist(),
        "free_energy_kt": math.log(left / right),
        "free_energy_error": float(np.hypot(*relative)),
        "noise": energy_numbers(noisy.double(), problem.reference_energies, seed),
    }


def parse_arguments(about: str | None, models: Collection[str]) -> argparse.Namespace:
    """The command line; without --models, those of the preset that are among the given ones."""
    parser = command_line(about, "results/alanine_dipeptide", PRESETS)
    parser.add_argument("--models", nargs="+", choices=list(models), help="those of the preset")
    arguments = parser.parse_args()
    if arguments.models is None:
        arguments.models = [name for name in PRESETS[arguments.preset].models if name in models]
    return arguments


def main() -> None:
    """Simulate and train what is missing, then write figure and table of what is there."""
    arguments = parse_arguments(__doc__, MODELS)
    output, workers, preset = arguments.output, arguments.workers, arguments.preset
    seed = arguments.seed
    torch.set_num_threads(1)
    data = record_file("data", preset, seed, output)
    if not arguments.figures:
        # Here, with all the workers, before the trainings ask for it.
        problem = Problem(PRESETS[preset], output, workers, progress=True)
        kept(data, lambda: data_record(problem, seed, data.with_suffix(".npz")))
        jobs = [(model, preset, seed, output, workers) for model in arguments.models]
        in_processes(run, jobs, workers)
    files = [record_file(model, preset, seed, output) for model in arguments.models]
    draw(output / f"alanine_dipeptide-{preset}-{seed}", data, files)


if __name__ == "__main__":
    main()
