"""BoltzmannGenerator: a molecule from its force field to weighted samples, kept in a folder."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import torch
from nflows.flows.base import Flow
from openmm import unit
from torch import Tensor
from tqdm.auto import tqdm

from p4flows.flows import spline_flow
from p4flows.molecules.dynamics import LangevinDynamics, simulate
from p4flows.molecules.energy import OpenMMEnergy
from p4flows.molecules.mixed import MixedCoordinateTransform
from p4flows.molecules.reweighting import (
    WeightedSamples,
    effective_sample_size,
    log_weights_of,
    resampled,
    weighted_samples,
)
from p4flows.molecules.system import Molecule, number
from p4flows.molecules.topology import Rotor, find_rotors, peptide_bonds
from p4flows.molecules.training import (
    Curve,
    load_checkpoint,
    save_checkpoint,
    train_flow,
    write_whole,
)

CLIP = 1e-4
# By how many nats held-out frames are worse off before frames are what is missing.
OVERFITTED = 0.3
# Below it, what the generator draws is too little to learn from.
REFINABLE = 0.2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines a generator, but the molecule and how long each step takes.

    Attributes:
        temperature: of the weights, in K.
        simulated: temperature of the simulation in K, for 0 the higher of 600 and the above:
            torsions interchange there, and energies bring the flow down.
        replicas: number of independent simulations.
        friction: in 1/ps; at 10 energies decorrelate six times as fast as at 1.
        blocks: of the flow.
        hidden: widths of its nets.
        batch: rows of a training step.
        learning_rate: Adam's, at the start.
        seed: of the simulation, the flow and the batches.

    Raises:
        TypeError: when a temperature is no number and no quantity.
        ValueError: when it is not positive, or the simulation is colder than the weights.
    """

    temperature: float = 300.0
    simulated: float = 0.0
    replicas: int = 6
    friction: float = 10.0
    blocks: int = 8
    hidden: tuple[int, ...] = (64, 64)
    batch: int = 512
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        temperature = number(self.temperature, unit.kelvin)
        simulated = number(self.simulated, unit.kelvin) or max(600.0, temperature)
        if not 0 < temperature <= simulated:
            raise ValueError(
                "temperature must be positive and no higher than that of the simulation, got "
                f"{temperature:g} and {simulated:g} K"
            )
        for name, value in (
            ("temperature", temperature),
            ("simulated", simulated),
            ("friction", number(self.friction, unit.picosecond**-1)),
            ("hidden", tuple(self.hidden)),
        ):
            object.__setattr__(self, name, value)


class BoltzmannGenerator:
    """A flow that draws structures of a molecule with the weights that make averages exact.

    Its steps are methods, in their order: `simulate`, `train`, `refine`, `sample`, `report`. Each
    keeps what it has done in the folder; called again, or after an interruption, it goes on there.

    Args:
        molecule: system, topology and start positions.
        output: the folder.
        settings: the settings; a folder of other ones is refused.
        workers: processes of the simulation and threads of the training.
        progress: whether to show progress bars.

    Attributes:
        coordinates: the `MixedCoordinateTransform`, after `train`.
        flow: the flow of its features.
        history: what each step did, as `summary.json` has it.

    Raises:
        ValueError: when the folder is of another molecule or other settings.

    Example:
        >>> import tempfile
        >>> from p4flows.molecules import alanine_dipeptide
        >>> folder = tempfile.mkdtemp()
        >>> BoltzmannGenerator(alanine_dipeptide(), folder, Settings(temperature=600.0)).coordinates
    """

    def __init__(
        self,
        molecule: Molecule,
        output: str | os.PathLike[str],
        settings: Settings = Settings(),
        *,
        workers: int = 2,
        progress: bool = True,
    ) -> None:
        self.molecule, self.settings, self.output = molecule, settings, Path(output)
        self.workers, self.progress = workers, progress
        self.coordinates: MixedCoordinateTransform | None = None
        self.flow: Flow | None = None
        self.samples: WeightedSamples | None = None
        self.frames: Tensor | None = None
        self.history: dict[str, Any] = {"seconds": {}}
        self.curve: list[Curve] = []
        self.energy = OpenMMEnergy(molecule.system, settings.temperature)
        self._omega = peptide_bonds(molecule.topology)
        self.output.mkdir(parents=True, exist_ok=True)
        self._claim_folder()

    # ------------------------------------------------------------------ the steps

    def simulate(self, *, minutes: float | None = None, frames: int = 30_000) -> Tensor:
        """Langevin dynamics of independent replicas.

        Args:
            minutes: after these no chunk is begun; None for all frames.
            frames: of each replica, at most.

        Returns:
            Positions in nm, shape `(replicas, frames, 3·atoms)`.
        """
        settings = self.settings
        with self._timed("simulation"):
            found = simulate(
                self.molecule,
                self.output / "md",
                dynamics=self._dynamics,
                replicas=settings.replicas,
                frames=frames,
                minutes=minutes,
                workers=self.workers,
                progress=self.progress,
            )
        self.frames = torch.from_numpy(found)
        self.history["frames"] = found.shape[0] * found.shape[1]
        return self.frames

    def train(self, *, minutes: float, steps: int | None = None) -> list[Curve]:
        """Likelihood of the frames of the simulation.

        Args:
            minutes: how long.
            steps: how many steps, instead of the minutes; ends with the same numbers every time.

        Returns:
            The training curve.
        """
        if self.frames is None:
            raise RuntimeError("there are no frames to train on: simulate() comes first")
        training, held_out = self.split()
        checkpoint, kept = self.output / "training.pt", self.output / "coordinates.pt"
        # The flow of an interrupted training is one of the features that it began with.
        found = load_checkpoint(kept) if checkpoint.exists() else None
        if found is None:
            self._build(training)
            self.save(kept)
        else:
            self._restore(found)
        rows, judges = self._features(training), self._features(held_out)
        with self._timed("training"), self._bar("training") as bar, self._threads():
            self.curve = train_flow(
                self.flow,
                rows,
                judges,
                minutes=minutes,
                steps=steps,
                batch=self.settings.batch,
                learning_rate=self.settings.learning_rate,
                seed=self.settings.seed,
                checkpoint=checkpoint,
                bar=bar,
            )
        self.history["steps"] = self.curve[-1].step if self.curve else 0
        self.save(self.output / "generator.pt")
        return self.curve

    def refine(
        self, *, minutes: float, rounds: int = 8, steps: int | None = None, samples: int = 0
    ) -> None:
        """Energies: the generator learns from its own reweighted samples.

        In each round it draws, reweights to the round's temperature and trains on what it has
        drawn, beside the frames where these are of the same temperature. The first half of the
        rounds goes down to the temperature of the settings.

        Args:
            minutes: how long.
            rounds: in how many rounds.
            steps: training steps of each round, instead of the minutes.
            samples: drawn in each round; by default what a third of the minutes is enough for.
        """
        assert self.coordinates is not None and self.flow is not None
        settings, hot = self.settings, self.settings.simulated
        state = self.output / "refining.pt"
        done = load_checkpoint(state) or {"round": 0, "pool": None, "rounds": []}
        if done["round"]:
            self.flow.load_state_dict(done["flow"])
        pool: Tensor | None = done["pool"]
        cooling = max(1, rounds // 2) if settings.temperature < hot else 1
        seconds = 60.0 * minutes / rounds
        for index in range(done["round"], rounds):
            with self._timed("refinement"), self._threads():
                share = min(index + 1, cooling) / cooling
                temperature = hot * (settings.temperature / hot) ** share
                torch.manual_seed(1_000 * (settings.seed + 1) + index)
                energy = OpenMMEnergy(self.molecule.system, temperature)
                begin = time.perf_counter()
                count = samples or int(
                    np.clip(0.33 * seconds / self._seconds_of_draw(), 5_000, 200_000)
                )
                drawn = self._draw(count, energy)
                size = effective_sample_size(drawn.log_weights, clip=CLIP)
                rows = len(drawn.log_weights)
                own = resampled(drawn.features, drawn.log_weights, clip=CLIP)
                own = own[: max(100, int(size * rows))]
                held_out, own = own[: len(own) // 10], own[len(own) // 10 :]
                if math.isclose(temperature, hot):
                    training, judges = self.split()
                    pool = self._features(training) if pool is None else pool
                    held_out = self._features(judges)
                elif not math.isclose(temperature, done.get("temperature", 0.0)):
                    pool = None
                pool = own if pool is None else torch.cat([pool, own])
                left = max(1.0, seconds - (time.perf_counter() - begin)) / 60.0
                with self._bar(f"round {index + 1} of {rounds}, {temperature:.0f} K") as bar:
                    train_flow(
                        self.flow,
                        pool,
                        held_out,
                        minutes=left,
                        steps=steps,
                        batch=settings.batch,
                        learning_rate=0.5 * settings.learning_rate,
                        span=(index / rounds, (index + 1) / rounds),
                        seed=settings.seed + index + 1,
                        bar=bar,
                    )
                done["rounds"].append(
                    {"temperature": temperature, "ess_clipped": size, "samples": rows}
                )
                done |= {"round": index + 1, "pool": pool, "temperature": temperature}
                save_checkpoint(state, {**done, "flow": self.flow.state_dict()})
        self.history["rounds"] = done["rounds"]
        self.save(self.output / "generator.pt")

    def sample(self, samples: int = 100_000) -> WeightedSamples:
        """Structures with weights; the files samples.npz, samples.pdb and samples.dcd.

        The weighted ones are in samples.npz. Those of samples.dcd are drawn from them with their
        weights, so that all count alike.

        Args:
            samples: how many.

        Returns:
            `WeightedSamples` at the temperature of the settings.
        """
        with self._timed("sampling"):
            torch.manual_seed(self.settings.seed + 1)
            found = self._draw(samples, self.energy)
        self.samples = found
        if not bool(found.log_weights.isfinite().any()):
            return found
        weights = torch.softmax(found.log_weights.double(), 0).numpy()
        arrays = {
            "positions": found.positions.numpy(),
            "energies": found.energies.numpy(),
            "log_weights": found.log_weights.numpy(),
            "weights": weights,
        }
        write_whole(self.output / "samples.npz", lambda aside: np.savez(aside, **arrays))
        count = min(10_000, len(weights))
        # Systematic: each as often as its weight has it, up to one.
        places = (np.arange(count) + np.random.default_rng(self.settings.seed).random()) / count
        rows = np.searchsorted(np.cumsum(weights), places).clip(max=len(weights) - 1)
        equal = self.molecule.trajectory(found.positions[rows].numpy())
        write_whole(self.output / "samples.pdb", lambda aside: equal[0].save_pdb(str(aside)))
        write_whole(self.output / "samples.dcd", lambda aside: equal.save_dcd(str(aside)))
        return found

    def report(self) -> dict[str, Any]:
        """Write summary.json, report.html, report.md and report.png.

        Returns:
            What summary.json has.
        """
        from p4flows.molecules.report import write_report

        with self._timed("report"):
            return write_report(self)

    def run(self, minutes: float) -> dict[str, Any]:
        """All steps within so many minutes, those of earlier calls included.

        Frames and likelihood get two fifths each. The rest goes to energies, when the effective
        sample size is in tens of percent or the temperature is to fall, and otherwise to more
        likelihood; a tenth is left for samples and the report.

        Args:
            minutes: wall-clock time of all.

        Returns:
            What summary.json has.
        """
        cold = self.settings.temperature < self.settings.simulated
        self.simulate(minutes=max(0.0, 0.35 * minutes - self.spent("simulation")))
        # What the simulation took too long, is the training's loss.
        end = 0.9 * minutes
        share = 0.55 if cold else 0.7
        training = share * (end - self.spent("simulation"))
        self.train(minutes=training)
        size = self._trial(self.settings.simulated)
        self.history["ess_before_refinement"] = size
        if cold or size >= REFINABLE:
            before = copy.deepcopy(self.flow.state_dict())
            left = end - self.spent("simulation", "training", "refinement")
            self.refine(minutes=max(left, 0.01 * minutes), rounds=12 if cold else 8)
            if not cold and self._trial(self.settings.temperature) < 0.95 * size:
                self.flow.load_state_dict(before)
                self.history["refinement_undone"] = True
        else:
            left = end - self.spent("simulation", "training")
            if self.curve[-1].held_out - self.curve[-1].training > OVERFITTED:
                self.simulate(minutes=0.5 * left, frames=1_000_000)
            self.train(minutes=end - self.spent("simulation"))
        took = self._seconds_of_draw()
        self.sample(int(np.clip(0.05 * 60.0 * minutes / took, 10_000, 500_000)))
        return self.report()

    # ------------------------------------------------------------------ files

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the trained generator to a file that `load` reads.

        Args:
            file: the path.
        """
        assert self.coordinates is not None and self.flow is not None
        atoms, bonds = mdtraj.Topology.from_openmm(self.molecule.topology).to_dataframe()
        content = {
            "name": self.molecule.name,
            "system": openmm.XmlSerializer.serialize(self.molecule.system),
            "atoms": atoms.to_json(),
            "bonds": torch.from_numpy(np.asarray(bonds, dtype=np.float64)),
            "positions": torch.from_numpy(self.molecule.positions),
            "settings": dataclasses.asdict(self.settings),
            "reference": self._reference,
            "rotors": [tuple(rotor) for rotor in self.coordinates.rotors],
            "coordinates": self.coordinates.state_dict(),
            "flow": self.flow.state_dict(),
        }
        save_checkpoint(Path(file), content)

    @classmethod
    def load(
        cls, file: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
    ) -> "BoltzmannGenerator":
        """A trained generator from the file that `save` has written.

        Args:
            file: the path.
            output: the folder of what it will write; by default that of the file.

        Returns:
            The generator, ready to `sample`.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is of another kind.
        """
        path = Path(file)
        found = load_checkpoint(path)
        if found is None:
            raise FileNotFoundError(f"there is no file {path}")
        if "reference" not in found:
            raise ValueError(f"{path} must be a generator's file, got another checkpoint")
        import pandas

        atoms = pandas.read_json(io.StringIO(found["atoms"]), dtype={"segmentID": str})
        topology = mdtraj.Topology.from_dataframe(atoms, found["bonds"].numpy()).to_openmm()
        system = openmm.XmlSerializer.deserialize(found["system"])
        molecule = Molecule(found["name"], system, topology, found["positions"].numpy())
        settings = Settings(**found["settings"])
        generator = cls(molecule, output if output is not None else path.parent, settings)
        generator._restore(found)
        return generator

    def _restore(self, found: dict[str, Any]) -> None:
        """Coordinates and flow of a file."""
        self._set_up(found["reference"], [Rotor(*rotor) for rotor in found["rotors"]])
        assert self.coordinates is not None
        self.coordinates.load_state_dict(found["coordinates"])
        self._new_flow()
        assert self.flow is not None
        self.flow.load_state_dict(found["flow"])

    # ------------------------------------------------------------------ parts of the steps

    @property
    def _dynamics(self) -> LangevinDynamics:
        settings = self.settings
        return LangevinDynamics(
            temperature=settings.simulated,
            friction=settings.friction,
            chunk=500,
            seed=settings.seed,
        )

    def same_isomer(self, positions: Tensor) -> Tensor:
        """Which structures have each peptide bond cis or trans as the molecule's start has it.

        Peptide bonds turn too rarely for a simulation to tell how often: other frames are left out,
        and samples of them have weight zero.

        Args:
            positions: in nm, shape `(N, 3·atoms)`.

        Returns:
            A bool tensor of shape `(N,)`.
        """
        start = torch.from_numpy(self.molecule.positions).reshape(1, -1).to(positions)
        both = torch.cat([start, positions]).numpy()
        angles = mdtraj.compute_dihedrals(
            self.molecule.trajectory(both), self._omega, periodic=False
        )
        trans = np.abs(angles) > math.pi / 2
        return torch.from_numpy((trans[1:] == trans[:1]).all(-1))

    def split(self) -> tuple[Tensor, Tensor]:
        """Frames of the training, and the last tenth of each replica to judge by."""
        assert self.frames is not None
        first = max(1, self.frames.shape[1] * 9 // 10)
        parts = (self.frames[:, :first].flatten(0, 1), self.frames[:, first:].flatten(0, 1))
        training, held_out = (rows[self.same_isomer(rows)] for rows in parts)
        total = self.frames.shape[0] * self.frames.shape[1]
        self.history["other_isomers"] = 1.0 - (len(training) + len(held_out)) / total
        return training, held_out

    def _build(self, training: Tensor) -> None:
        """Coordinates and a flow for frames, with the groups that their energies know as equal."""
        few = training[:: max(1, len(training) // 200)][:200]
        energies = self.energy(few.double())
        rotors, differences = [], {}
        for rotor in find_rotors(self.molecule.topology, self.molecule.positions):
            turned = few.unflatten(-1, (-1, 3))[:, list(rotor.permutation)].flatten(1)
            change = (self.energy(turned.double()) - energies).abs().max().item()
            atoms = list(self.molecule.topology.atoms())
            name = f"{atoms[rotor.axis[1]].name} of {atoms[rotor.axis[1]].residue.name}"
            differences[name] = change
            if change < 1.0:
                rotors.append(rotor)
        self.history["rotors"] = differences
        self._reference = few
        self._set_up(training, rotors)

    def _set_up(self, frames: Tensor, rotors: list[Rotor]) -> None:
        self.coordinates = MixedCoordinateTransform(
            frames, self.molecule.topology, rotors=rotors, circular=True
        )
        self._reference = frames[:: max(1, len(frames) // 200)][:200].clone()
        self._new_flow()

    def _new_flow(self) -> None:
        assert self.coordinates is not None
        torch.manual_seed(self.settings.seed)
        self.flow = spline_flow(
            self.coordinates.features,
            self.settings.blocks,
            circular=self.coordinates.circular,
            hidden=self.settings.hidden,
        ).eval()

    @torch.no_grad()
    def _features(self, frames: Tensor) -> Tensor:
        assert self.coordinates is not None
        coordinates = self.coordinates
        return torch.cat([coordinates(coordinates.fold(p))[0] for p in frames.split(20_000)])

    def _trial(self, temperature: float) -> float:
        """Effective sample size, clipped, of some samples."""
        drawn = self._draw(5_000, OpenMMEnergy(self.molecule.system, temperature))
        return effective_sample_size(drawn.log_weights, clip=CLIP)

    def _seconds_of_draw(self) -> float:
        begin = time.perf_counter()
        self._draw(2_000, self.energy)
        return (time.perf_counter() - begin) / 2_000

    def _draw(self, samples: int, energy: OpenMMEnergy) -> WeightedSamples:
        assert self.coordinates is not None and self.flow is not None
        found = weighted_samples(self.flow, self.coordinates, energy, samples)
        other = ~self.same_isomer(found.positions)
        return found._replace(log_weights=found.log_weights.masked_fill(other, -math.inf))

    def frame_log_weights(self, frames: Tensor, energy: OpenMMEnergy) -> Tensor:
        """Log-weights of frames, with the constant of the samples' weights.

        Args:
            frames: in nm, shape `(N, 3·atoms)`.
            energy: of the temperature of the frames.

        Returns:
            Shape `(N,)`.
        """
        assert self.coordinates is not None and self.flow is not None
        return log_weights_of(self.flow, self.coordinates, energy, frames)

    # ------------------------------------------------------------------ bookkeeping

    def _claim_folder(self) -> None:
        file = self.output / "settings.json"
        own = {"molecule": self.molecule.name, "atoms": self.molecule.atoms}
        own |= json.loads(json.dumps(dataclasses.asdict(self.settings)))
        if file.exists():
            try:
                found = json.loads(file.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{file} is garbled ({error}): take another folder") from error
            differing = [name for name in own if found.get(name) != own[name]]
            if differing:
                name = differing[0]
                raise ValueError(
                    f"{self.output} is of another run, {name} {found.get(name)} and not "
                    f"{own[name]}: take another folder"
                )
            self.history = found.get("history", self.history)
        else:
            self._note()

    def _note(self) -> None:
        own = {"molecule": self.molecule.name, "atoms": self.molecule.atoms}
        text = json.dumps(
            {**own, **dataclasses.asdict(self.settings), "history": self.history}, indent=1
        )
        write_whole(self.output / "settings.json", lambda aside: aside.write_text(text))

    def spent(self, *steps: str) -> float:
        """Minutes that steps have taken, in earlier calls as well.

        Args:
            steps: "simulation", "training", "refinement", "sampling", "report".

        Returns:
            Their sum.
        """
        return sum(self.history["seconds"].get(step, 0.0) for step in steps) / 60.0

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        begin, before = time.perf_counter(), self.history["seconds"].get(step, 0.0)
        try:
            yield
        finally:
            self.history["seconds"][step] = before + time.perf_counter() - begin
            self._note()

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.workers)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _bar(self, title: str) -> tqdm:
        return tqdm(
            desc=title,
            total=1.0,
            disable=not self.progress,
            mininterval=1.0,
            bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}",
        )
