"""Boltzmann generators of alanine dipeptide in bgflow (paper, Section 4.3).

    python examples/alanine_dipeptide_bgflow.py --preset quick

The experiment of examples/alanine_dipeptide.py, whose data, figure and table it shares, with
bgflow's MixedCoordinateTransformation, OpenMMEnergy, BoltzmannGenerator and KLTrainer around the
flow of this library. Needs bgflow; docs/bgflow.md has the command that installs it.
"""

import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from alanine_dipeptide import (
    BATCH,
    PRESETS,
    SAMPLES,
    TEMPERATURE,
    Preset,
    Problem,
    Samples,
    data_record,
    evaluate,
    parse_arguments,
    record_file,
)
from alanine_dipeptide_flows import MODELS
from alanine_dipeptide_report import draw
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
from experiment import Record, in_processes, kept
from nflows.flows.base import Flow as NflowsFlow
from torch import Tensor
from torch.distributions import AffineTransform
from tqdm.auto import tqdm

from p4flows import MergeHook
from p4flows.bgflow import FlowTransform, realnvp_flow
from p4flows.flows.base import BaseNormal
from p4flows.molecules import MixedCoordinateTransform


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


def bgflow_coordinates(ours: MixedCoordinateTransform, frames: Tensor) -> Flow:
    """bgflow's coordinates, positions → (lengths, angles, torsions, block), of the same z-matrix.

    It whitens the block as it comes, without superposition: frames must have place and orientation
    in common, as `superposed` gives them.
    """
    block = np.array(ours.z_matrix.block)
    return MixedCoordinateTransformation(
        frames,
        np.array(ours.z_matrix.rows),
        block,
        keepdims=3 * len(block) - 6,
        raise_warnings=False,
    )


def superposed(ours: MixedCoordinateTransform, frames: Tensor) -> Tensor:
    return ours.inverse(ours(frames)[0])[0]


@torch.no_grad()
def compare(ours: MixedCoordinateTransform, theirs: Flow, frames: Tensor) -> dict[str, float]:
    """How far our coordinates are from theirs, before standardisation.

    Theirs are in half turns and in turns. Their log-determinant leaves out what the block's
    rotations contribute, which is not constant.
    """
    features, logabsdet = ours(frames)
    rows, block = len(ours.z_matrix.rows), list(ours.z_matrix.block)
    standard = features[:, -3 * rows :].reshape(len(features), 3, rows).mT
    length, angle, torsion = (standard * ours.deviation + ours.mean).unbind(-1)
    *internal, _, dlogp = theirs(frames)
    turns = torsion / (2.0 * math.pi) + 0.5 - internal[2]
    difference = logabsdet - dlogp.squeeze(-1)
    _, of_block = ours.whitening(frames.reshape(len(frames), -1, 3)[:, block])
    return {
        "length_nm": (length - internal[0]).abs().max().item(),
        "angle_half_turns": (angle / math.pi - internal[1]).abs().max().item(),
        "torsion_turns": (turns - turns.round()).abs().max().item(),
        "logabsdet_std": difference.std().item(),
        "logabsdet_std_without_block": (difference - of_block).std().item(),
    }


def standardised(theirs: Flow, frames: Tensor, cuts: Tensor) -> Flow:
    """Features of mean 0 and variance 1 → positions; torsions count from their cut on."""
    lengths, angles, torsions, block, _ = theirs(frames)
    parts = [lengths, angles, (torsions - cuts) % 1.0, block]
    standard = torch.cat(parts, -1)
    return SequentialFlow(
        [
            TorchTransform(AffineTransform(standard.mean(0), standard.std(0)), 1),
            SplitFlow(*(part.shape[-1] for part in parts)),
            WrapFlow(TorsionsFromCut(cuts), [2]),
            InverseFlow(theirs),
        ]
    )


class BgflowProblem(Problem):
    """The same data in bgflow's mixed coordinates, with bgflow's energy."""

    def __init__(self, preset: Preset, output: Path, workers: int, progress: bool) -> None:
        super().__init__(preset, output, workers, progress)
        ours = self.coordinates
        self.replicas = torch.stack([superposed(ours, frames) for frames in self.replicas])
        self.frames = self.replicas[:-1][self.trans[:-1]]
        theirs = bgflow_coordinates(ours, self.frames)
        self.comparison = compare(ours, theirs, self.frames[:SAMPLES])
        self.layers = standardised(theirs, self.frames, ours.cuts / (2.0 * math.pi) + 0.5)
        self.coordinates = FlowTransform(InverseFlow(self.layers))
        self.features = self.coordinates(self.frames)[0]
        integrator = openmm.LangevinIntegrator(TEMPERATURE, 1.0, 0.001)
        bridge = OpenMMBridge(self.molecule.system, integrator, "Reference", n_workers=1)
        self.target = OpenMMEnergy(bridge=bridge)


def train(
    problem: BgflowProblem, model: str, preset: Preset, seed: int
) -> tuple[dict[str, Any], Samples]:
    """Both stages of training; the record and the last samples."""
    torch.manual_seed(seed)
    prior = NormalDistribution(60)
    flow = realnvp_flow(60, 25, swap="p4" if model == "p4inv" else "permutation", paper=True)
    highest_seen = problem.reference_energies.max().item()
    target = LinLogCutEnergy(problem.target, high_energy=highest_seen + 10.0, max_energy=1e20)
    # The coordinates have no parameters: without energies, features are all that is needed.
    of_features = BoltzmannGenerator(prior, flow, target=None)
    of_positions = BoltzmannGenerator(prior, SequentialFlow([flow, problem.layers]), target)
    # Data → noise is forward in nflows.
    density = NflowsFlow(FlowTransform(InverseFlow(flow)), BaseNormal(60))
    record: dict[str, Any] = {
        "model": MODELS[model].title,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
    }
    for stage, steps, learning_rate, energy_weight, generator, data in (
        ("likelihood", preset.steps, 1e-3, 0.0, of_features, problem.features),
        ("mixed", preset.mixed_steps, 1e-5, 0.05, of_positions, problem.frames),
    ):
        optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate)
        hook = None
        if model == "p4inv":
            hook = MergeHook.paper(flow, optimizer, every=100)
        schedulers = []
        if preset.decay and stage == "likelihood":
            schedulers = [(1, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))]
        trainer = KLTrainer(generator, optim=optimizer, train_energy=energy_weight > 0.0)
        begin = time.perf_counter()
        trainer.train(
            steps,
            data=data,
            batchsize=BATCH,
            w_likelihood=1.0,
            w_energy=energy_weight,
            schedulers=schedulers,
            progress_bar=tqdm,
        )
        numbers, samples = evaluate(problem, density, seed)
        record[stage] = {
            "steps": steps,
            "learning_rate": learning_rate,
            "seconds_per_step": (time.perf_counter() - begin) / steps,
            "merges": dict(hook.stats) if hook is not None else None,
            **numbers,
        }
        if hook is not None:
            hook.remove()
    return record, samples


def run(model: str, preset_name: str, seed: int, output: Path) -> Record:
    """Train one model; its samples are kept beside its record."""
    warnings.simplefilter("ignore")  # of bgflow: it indexes by lists
    file, preset = record_file(f"bgflow-{model}", preset_name, seed, output), PRESETS[preset_name]

    def make() -> Record:
        problem = BgflowProblem(preset, output, workers=1, progress=False)
        record, samples = train(problem, model, preset, seed)
        samples.save(file.with_suffix(".npz"))
        return record

    return kept(file, make)


def main() -> None:
    """Train what is missing, then write figure and table of what is there."""
    arguments = parse_arguments(__doc__, ("rnvp", "p4inv"))
    output, preset, seed = arguments.output, arguments.preset, arguments.seed
    torch.set_num_threads(1)
    data = record_file("bgflow-data", preset, seed, output)
    if not arguments.figures:
        problem = BgflowProblem(PRESETS[preset], output, arguments.workers, progress=True)

        def make() -> Record:
            record = data_record(problem, seed, data.with_suffix(".npz"))
            return record | {"coordinates": problem.comparison}

        kept(data, make)
        jobs = [(model, preset, seed, output) for model in arguments.models]
        in_processes(run, jobs, arguments.workers)
    files = [record_file(f"bgflow-{model}", preset, seed, output) for model in arguments.models]
    draw(output / f"alanine_dipeptide_bgflow-{preset}-{seed}", data, files)


if __name__ == "__main__":
    main()
