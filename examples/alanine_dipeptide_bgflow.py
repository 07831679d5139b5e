"""Boltzmann generators of alanine dipeptide, of bgflow's own parts (paper, Section 4.3).

    python examples/alanine_dipeptide_bgflow.py --preset quick

The experiment of examples/alanine_dipeptide.py, whose data, figure and table it shares, with
bgflow's MixedCoordinateTransformation, OpenMMEnergy, BoltzmannGenerator and KLTrainer around the P4
layers of this library. Needs bgflow; docs/bgflow.md has the command that installs it.
"""

import concurrent.futures
import json
import multiprocessing
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from alanine_dipeptide import (
    BATCH,
    MODELS,
    PRESETS,
    SAMPLES,
    TEMPERATURE,
    Preset,
    Problem,
    data_record,
    evaluate,
    figure,
    parse_arguments,
    table,
)
from bgflow import (
    BoltzmannGenerator,
    Flow,
    InverseFlow,
    KLTrainer,
    LinLogCutEnergy,
    MixedCoordinateTransformation,
    NormalDistribution,
    OpenMMBridge,
    OpenMMEnergy,
    SequentialFlow,
    SplitFlow,
    TorchTransform,
    WrapFlow,
)
from nflows.flows.base import Flow as NflowsFlow
from torch import Tensor
from torch.distributions import AffineTransform
from tqdm.auto import tqdm

from p4flows import MergeHook
from p4flows.base_distribution import BaseNormal
from p4flows.bgflow import as_transform, realnvp_flow
from p4flows.molecules import sample_with_weights

LEARNING_RATES = {"likelihood": 1e-3, "mixed": 1e-5}


class TorsionsFromCut(Flow):
    """Torsions in turns, counted from a cut on → in [0, 1); those beyond it are second images.

    bgflow's CircularShiftFlow refuses what is beyond.
    """

    def __init__(self, cuts: Tensor) -> None:
        super().__init__()
        self.register_buffer("cuts", cuts)

    def _forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return (x + self.cuts) % 1.0, torch.zeros_like(x[..., :1])

    def _inverse(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return (x - self.cuts) % 1.0, torch.zeros_like(x[..., :1])


class BgflowProblem(Problem):
    """The same data in bgflow's mixed coordinates.

    Its whitening is of coordinates as they come, without superposition: the frames get the place
    and orientation that our coordinates give them.
    """

    def __init__(self, preset: Preset, output: Path, workers: int, progress: bool) -> None:
        super().__init__(preset, output, workers, progress)
        ours = self.coordinates
        self.replicas = torch.stack([ours.inverse(ours(frames)[0])[0] for frames in self.replicas])
        self.frames = self.replicas[:-1].flatten(0, 1)
        z_matrix = ours.z_matrix
        self.mixed = MixedCoordinateTransformation(
            self.frames,
            np.array(z_matrix.rows),
            np.array(z_matrix.block),
            keepdims=3 * len(z_matrix.block) - 6,
            raise_warnings=False,
        )
        self.comparison = self.compare(self.frames[:SAMPLES])
        self.layers = self.standardised(ours.cuts / (2.0 * torch.pi) + 0.5)
        self.coordinates = as_transform(InverseFlow(self.layers))
        integrator = openmm.LangevinIntegrator(TEMPERATURE, 1.0, 0.001)
        bridge = OpenMMBridge(self.molecule.system, integrator, "Reference", n_workers=1)
        self.target = OpenMMEnergy(bridge=bridge)

    @torch.no_grad()
    def compare(self, frames: Tensor) -> dict[str, float]:
        """Largest differences between bgflow's coordinates and ours, before standardisation."""
        ours = self.coordinates
        features, logabsdet = ours(frames)
        count = len(ours.z_matrix.rows)
        standard = features[:, -3 * count :].reshape(len(features), 3, count).mT
        length, angle, torsion = (standard * ours.deviation + ours.mean).unbind(-1)
        *theirs, _, dlogp = self.mixed(frames)
        turns = torsion / (2.0 * torch.pi) + 0.5 - theirs[2]
        _, block = ours.whitening(frames.reshape(len(frames), -1, 3)[:, list(ours.z_matrix.block)])
        difference = logabsdet - dlogp.squeeze(-1)
        return {
            "length_nm": (length - theirs[0]).abs().max().item(),
            "angle_pi": (angle / torch.pi - theirs[1]).abs().max().item(),
            "torsion_turns": (turns - turns.round()).abs().max().item(),
            "logabsdet_std": difference.std().item(),
            "logabsdet_std_without_block": (difference - block).std().item(),
        }

    def standardised(self, cuts: Tensor) -> Flow:
        """Features of mean 0 and variance 1 → positions; torsions count from their cut on."""
        *internal, whitened, _ = self.mixed(self.frames)
        internal[2] = (internal[2] - cuts) % 1.0
        parts = [*internal, whitened]
        standard = torch.cat(parts, -1)
        return SequentialFlow(
            [
                TorchTransform(AffineTransform(standard.mean(0), standard.std(0)), 1),
                SplitFlow(*(part.shape[-1] for part in parts)),
                WrapFlow(TorsionsFromCut(cuts), [2]),
                InverseFlow(self.mixed),
            ]
        )


def train(
    problem: BgflowProblem, model: str, preset: Preset, seed: int
) -> tuple[NflowsFlow, dict[str, Any]]:
    """Both stages of training; the flow of features as nflows has it, and its record."""
    torch.manual_seed(seed)
    prior = NormalDistribution(60)
    flow = realnvp_flow(60, 25, swap="p4" if model == "p4inv" else "permutation")
    highest_seen = problem.reference_energies.max().item()
    target = LinLogCutEnergy(problem.target, high_energy=highest_seen + 10.0, max_energy=1e20)
    generator = BoltzmannGenerator(prior, SequentialFlow([flow, problem.layers]), target)
    # Data → noise is forward in nflows.
    density = NflowsFlow(as_transform(InverseFlow(flow)), BaseNormal(60))
    record: dict[str, Any] = {
        "model": MODELS[model],
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
    }
    for stage, steps in (("likelihood", preset.steps), ("mixed", preset.mixed_steps)):
        optimizer = torch.optim.Adam(flow.parameters(), lr=LEARNING_RATES[stage])
        hook = None
        if model == "p4inv":
            hook = MergeHook(flow, optimizer, every=100, force_every=10, correct_every=50)
        trainer = KLTrainer(generator, optim=optimizer, train_energy=stage == "mixed")
        begin = time.perf_counter()
        trainer.train(
            steps,
            data=problem.frames,
            batchsize=BATCH,
            w_likelihood=1.0,
            w_energy=0.05 if stage == "mixed" else 0.0,
            progress_bar=tqdm,
        )
        record[stage] = {
            "steps": steps,
            "learning_rate": LEARNING_RATES[stage],
            "seconds_per_step": (time.perf_counter() - begin) / steps,
            "merges": dict(hook.stats) if hook is not None else None,
            **evaluate(problem, density, seed),
        }
        if hook is not None:
            hook.remove()
    return density.eval(), record


def run(
    model: str, preset_name: str, seed: int, output: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train one model: its record, and energies and torsions of its samples."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of bgflow: it indexes by lists
    preset = PRESETS[preset_name]
    problem = BgflowProblem(preset, output, workers=1, progress=False)
    density, record = train(problem, model, preset, seed)
    torch.manual_seed(seed)
    positions, energies, _ = sample_with_weights(
        density, problem.coordinates, problem.energy, SAMPLES
    )
    return record, {"energies": energies.numpy(), "torsions": problem.torsions(positions)}


def main() -> None:
    """Train, then write figure, table and JSON."""
    arguments = parse_arguments()
    output, preset, seed = arguments.output, arguments.preset, arguments.seed
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    problem = BgflowProblem(PRESETS[preset], output, arguments.workers, progress=True)
    print(f"bgflow's coordinates and ours differ by at most {json.dumps(problem.comparison)}")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        futures = [pool.submit(run, model, preset, seed, output) for model in arguments.models]
        results = [future.result() for future in futures]

    records = [record for record, _ in results]
    samples = {record["model"]: found for record, found in results}
    data = data_record(problem, seed)
    stem = output / f"alanine_dipeptide_bgflow-{preset}-{seed}"
    figure(problem, samples, seed).savefig(stem.with_suffix(".png"), dpi=150)
    command = f"python examples/alanine_dipeptide_bgflow.py --preset {preset} --seed {seed}"
    stem.with_suffix(".md").write_text(table(data, records, command))
    numbers = {"coordinates": problem.comparison, "data": data, "models": records}
    stem.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(table(data, records, command))
    print(f"figure: {stem.with_suffix('.png')}")


if __name__ == "__main__":
    main()
