"""A Boltzmann generator whose weights are worth something: splines on circles, then energies.

    python examples/boltzmann_generator.py --preset quick
    python examples/boltzmann_generator.py --preset likelihood
    python examples/boltzmann_generator.py --preset unturned
    python examples/boltzmann_generator.py --preset long
    python examples/boltzmann_generator.py --preset cold
    python examples/boltzmann_generator.py --preset tetrapeptide

Simulates the molecule, trains a flow on R^p × T^q by likelihood, first on frames, then in rounds on
its own reweighted samples and frames, methyl groups turned at random in each batch, and writes a
figure, a table, the numbers and weighted samples that mdtraj reads. Simulation and training
continue where an interrupted run stopped; --figures only draws.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boltzmann_generator_problem import Preset, Problem
from boltzmann_generator_report import COLUMNS, distributions, figure, merits, merits_of_mean
from experiment import Record, cells, command_line, kept, publish, table, there
from nflows.flows.base import Flow
from torch import Tensor
from tqdm.auto import tqdm

from p4flows import InvertibleMatrix, MergeHook, fit, spline_flow
from p4flows.molecules import (
    WeightedSamples,
    effective_sample_size,
    permuted,
    resampled,
    save_weighted,
    weighted_samples,
)

CLIP = 1e-4
CLIP_NORM = 100.0
SAVED_STRUCTURES = 10_000

# Frames alone; unturned, what is lost when each has its hydrogens in one order only.
LIKELIHOOD = Preset(friction=1.0, replicas=10, batch=512, steps=3_000, rounds=0)
PRESETS = {
    "quick": Preset(),
    "likelihood": LIKELIHOOD,
    "unturned": dataclasses.replace(LIKELIHOOD, turn=False),
    # Rounds are worth most at the end, where the learning rate is low and the weights are good.
    "long": Preset(
        friction=1.0,
        replicas=10,
        frames=50_000,
        hidden=(128, 128),
        batch=512,
        steps=4_000,
        rounds=8,
        round_steps=500,
        round_samples=250_000,
        samples=500_000,
        orders=27,
    ),
    # From frames at 600 K to weights at 300 K: no simulation at 300 K is needed.
    "cold": Preset(
        friction=1.0,
        replicas=10,
        batch=512,
        steps=2_500,
        rounds=12,
        round_steps=400,
        round_samples=200_000,
        cooling=6,
        last_temperature=300.0,
        samples=500_000,
        ensembles=6,
        orders=27,
    ),
    # Rounds would not pay: an effective sample size below a percent leaves them too few samples.
    "tetrapeptide": Preset(molecule="tetrapeptide", frames=12_000, steps=1_000, rounds=0),
}


def build_flow(problem: Problem, preset: Preset, swap: str, seed: int) -> Flow:
    """The flow at its start."""
    torch.manual_seed(seed)
    return spline_flow(
        problem.coordinates.features,
        preset.blocks,
        circular=problem.coordinates.circular,
        swap=swap,
        hidden=preset.hidden,
    )


class Training:
    """One optimizer, one schedule and one hook over all segments, each with a checkpoint."""

    def __init__(
        self, problem: Problem, preset: Preset, flow: Flow, seed: int, stem: Path, progress: bool
    ) -> None:
        self.problem, self.preset, self.flow = problem, preset, flow
        self.seed, self.stem, self.progress = seed, stem, progress
        self.optimizer = torch.optim.Adam(flow.parameters(), lr=preset.learning_rate, fused=True)
        self.optimizer.register_step_pre_hook(self._clip)
        self.hook = None
        if any(isinstance(module, InvertibleMatrix) for module in flow.modules()):
            self.hook = MergeHook(flow, self.optimizer)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, preset.steps + preset.rounds * preset.round_steps
        )
        self.seconds = 0.0
        # What is distributed as the molecule at the temperature of the last round.
        self.pool, self.pool_temperature = problem.training, problem.temperature

    def likelihood(self) -> None:
        """The first segment: frames of the simulation."""
        self._fit("likelihood", self.preset.steps)

    def round(self, number: int) -> dict[str, float]:
        """Draw from the flow, reweight to the round's temperature, train on that.

        A reweighted sample is as good as an independent frame, at a tenth of its price. Samples
        join the frames and those of earlier rounds of the same temperature: what is drawn anew in
        each round is learnt, and what is drawn once is learnt by heart.
        """
        preset, temperature = self.preset, self.preset.ladder[number - 1]
        torch.manual_seed(1_000 * (self.seed + 1) + number)
        self.flow.eval()
        energy = self.problem.energy(temperature)
        drawn = weighted_samples(self.flow, self.problem.coordinates, energy, preset.round_samples)
        self.flow.train()
        share = effective_sample_size(drawn.log_weights, clip=CLIP)
        own = resampled(drawn.positions, drawn.log_weights, clip=CLIP)[
            : int(share * preset.round_samples)
        ]
        if math.isclose(temperature, self.pool_temperature):
            self.pool = torch.cat([self.pool, own])
        else:
            self.pool, self.pool_temperature = own, temperature
        if self.progress:
            tqdm.write(
                f"round {number} at {temperature:.0f} K: ESS {share:.1%} (clipped), "
                f"training on {len(self.pool):,} structures"
            )
        self._fit(f"round{number}", preset.round_steps)
        return {
            "temperature": temperature,
            "effective_sample_size": share,
            "pool": len(self.pool),
        }

    def _batch(self, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.pool), (self.preset.batch,), generator=generator)
        positions = self.pool[rows]
        if self.preset.turn:
            positions = permuted(positions, self.problem.turns, generator=generator)
        return self.problem.coordinates(positions)[0]

    def _fit(self, segment: str, steps: int) -> None:
        result = fit(
            self.flow,
            self._batch,
            steps=steps,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            hook=self.hook,
            generator=torch.Generator().manual_seed(self.seed),
            checkpoint=self.stem.with_name(f"{self.stem.name}-{segment}.pt"),
            checkpoint_every=250,
            resume=True,
            progress=self.progress,
        )
        self.seconds += result.seconds

    def _clip(self, *_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.flow.parameters(), CLIP_NORM)


def evaluate(
    problem: Problem, flow: Flow, temperature: float, preset: Preset, seed: int
) -> tuple[dict[str, Any], WeightedSamples]:
    """Figures of merit of the flow at a temperature, on samples of its own and on frames."""
    flow.eval()
    torch.manual_seed(seed + 1)
    energy = problem.energy(temperature)
    drawn = weighted_samples(flow, problem.coordinates, energy, preset.samples)
    numbers = merits(problem, flow, drawn, energy, seed)
    turns = problem.turns[: preset.orders]
    if len(turns) > 1:
        turned = weighted_samples(
            flow, problem.coordinates, energy, preset.turned, symmetries=turns
        )
        numbers["mean"] = merits_of_mean(problem, flow, turned, energy, turns, seed)
    flow.train()
    return numbers, drawn


def record_file(preset: str, swap: str, seed: int, output: Path) -> Path:
    return output / f"{preset}-{swap}-{seed}.json"


def run(
    preset: str, swap: str, seed: int, output: Path, workers: int, progress: bool = True
) -> Record:
    """Both stages and the numbers behind them, or the record of a run that is done."""
    file = record_file(preset, swap, seed, output)
    return kept(file, lambda: train(preset, swap, seed, output, workers, progress))


def train(
    preset_name: str, swap: str, seed: int, output: Path, workers: int, progress: bool
) -> Record:
    """A run; what is drawn of it and weighted samples are kept beside its record."""
    begin = time.perf_counter()
    preset = PRESETS[preset_name]
    stem = record_file(preset_name, swap, seed, output).with_suffix("")
    problem = Problem(preset, output, workers, progress)
    simulated = time.perf_counter() - begin
    flow = build_flow(problem, preset, swap, seed)
    training = Training(problem, preset, flow, seed, stem, progress)
    training.likelihood()
    rounds = [training.round(number) for number in range(1, preset.rounds + 1)]
    numbers, drawn = evaluate(problem, flow, preset.last_temperature, preset, seed)
    seconds = time.perf_counter() - begin
    np.savez(
        stem.with_suffix(".npz"),
        **distributions(problem, drawn, problem.energy(preset.last_temperature)),
    )
    save_weighted(
        problem.molecule,
        stem.with_name(f"{stem.name}-samples"),
        drawn.positions[:SAVED_STRUCTURES],
        drawn.log_weights[:SAVED_STRUCTURES],
    )
    return {
        "preset": preset_name,
        "swap": swap,
        "seed": seed,
        "settings": dataclasses.asdict(preset),
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "circular": problem.coordinates.circular,
        "cis_share": 1.0 - problem.simulated.trans.double().mean().item(),
        "simulation_seconds": simulated,
        "training_seconds": training.seconds,
        "seconds": seconds,
        "samples_seen": training.scheduler.T_max * preset.batch,
        "energies": preset.rounds * preset.round_samples,
        "merges": dict(training.hook.stats) if training.hook is not None else None,
        "rounds": rounds,
        **numbers,
    }


def main() -> None:
    """Run a preset and write its figure and table."""
    parser = command_line(__doc__, "results/boltzmann_generator", PRESETS)
    parser.add_argument(
        "--swap", choices=("p4", "lu", "random-halves", "halves"), default="p4", help="see the docs"
    )
    arguments = parser.parse_args()
    job = arguments.preset, arguments.swap, arguments.seed, arguments.output
    if not arguments.figures:
        run(*job, arguments.workers)
    file = record_file(*job)
    record = there([file], beside=".npz")[file]
    figure(dict(np.load(file.with_suffix(".npz"))), record).savefig(
        file.with_suffix(".png"), dpi=150
    )
    rows = [[title, *cells(record, {title: form})] for title, form in COLUMNS.items()]
    name = f"{record['preset']}, {record['swap']}, seed {record['seed']}"
    publish(file.with_suffix(".md"), [record], table(["", name], rows))
    print(f"files: {file.with_suffix('')}*")


if __name__ == "__main__":
    main()
