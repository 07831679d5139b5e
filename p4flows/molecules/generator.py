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
import pandas
import torch
from nflows.flows.base import Flow
from openmm import unit
from torch import Tensor

from p4flows.flows import spline_flow
from p4flows.molecules.dynamics import LangevinDynamics, progress_bar, simulate
from p4flows.molecules.energy import OpenMMEnergy
from p4flows.molecules.mixed import MixedCoordinateTransform
from p4flows.molecules.reweighting import (
    WeightedSamples,
    effective_sample_size,
    log_weights_of,
    resampled,
    weighted_samples,
)
from p4flows.molecules.storage import load_checkpoint, save_checkpoint, write_whole
from p4flows.molecules.system import Molecule, number
from p4flows.molecules.topology import Rotor, find_rotors, peptide_bonds
from p4flows.molecules.training import Curve, Training

CLIP = 1e-4  # share of the largest weights
REFINABLE = 0.2  # with a smaller effective sample size, samples are too few to learn from
# Steps that a round needs: after 60 the effective sample size of alanine was lower than before.
_ROUND = 400
_TRAINED = 0.67  # of the time of a round, which the draws leave
OVERFITTED = 0.3  # nats between held-out and training frames, from which on frames are missing


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines a generator, but the molecule and how long each step takes.

    Attributes:
        temperature: of the weights, in K or as an OpenMM quantity.
        simulated: temperature of the simulation in K; for 0 it is 600, or `temperature` where that
            is higher: torsions interchange there, and energies bring the flow down.
        replicas: number of independent simulations.
        friction: in 1/ps; at 10 energies decorrelate six times as fast as at 1.
        blocks: of the flow.
        hidden: widths of its nets.
        batch: rows of a training step.
        learning_rate: Adam's, at the start.
        noise: of the batches, in standard deviations of the data; falls with the learning rate.
        weight_decay: AdamW's, of the nets.
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
    noise: float = 0.4
    weight_decay: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        temperature = number(self.temperature, unit.kelvin)
        simulated = number(self.simulated, unit.kelvin) or max(600.0, temperature)
        if not 0 < temperature <= simulated:
            raise ValueError(
                "temperature must be positive and no higher than that of the simulation, got "
                f"{temperature:g} and {simulated:g} K"
            )
        if self.replicas < 2:
            raise ValueError(f"replicas must be at least 2, to be compared, got {self.replicas}")
        for name, value in (
            ("temperature", temperature),
            ("simulated", simulated),
            ("friction", number(self.friction, unit.picosecond**-1)),
            ("hidden", tuple(self.hidden)),
        ):
            object.__setattr__(self, name, value)


class BoltzmannGenerator:
    """A flow that draws structures of a molecule with the weights that make averages exact.

    Its steps are methods, in their order: `simulate`, `train`, `refine`, `sample`, `report`; `run`
    is all of them. Each keeps what it does in the folder; called again, or after an interruption,
    it goes on there.

    Args:
        molecule: system, topology and start positions.
        output: the folder of all results; one of another run is refused.
        settings: the settings.
        workers: processes of the simulation and threads of the training.
        progress: whether to show progress bars.

    Attributes:
        frames: of the simulation in nm, shape `(replicas, frames, 3·atoms)`, after `simulate`.
        coordinates: the `MixedCoordinateTransform`, after `train`.
        flow: the flow of its features, after `train`.
        curve: points of the training, after `train`.
        samples: the last `WeightedSamples`, after `sample`.
        history: what was done, and how many seconds each step took.

    Raises:
        ValueError: when the folder is of another molecule or other settings.

    Example:
        >>> import tempfile
        >>> from p4flows.molecules import alanine_dipeptide
        >>> tiny = Settings(temperature=600.0, replicas=2, blocks=1, hidden=(8,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     generator = BoltzmannGenerator(alanine_dipeptide(), folder, tiny, progress=False)
        >>> generator.spent("simulation")
        0.0
    """

    coordinates: MixedCoordinateTransform
    flow: Flow
    frames: Tensor
    samples: WeightedSamples

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
        self.curve: list[Curve] = []
        self.history: dict[str, Any] = {"seconds": {}}
        self._omega = peptide_bonds(molecule.topology)
        self.output.mkdir(parents=True, exist_ok=True)
        self._claim_folder()

    def simulate(
        self, *, minutes: float | None = None, frames: int = 30_000, chunk: int = 500
    ) -> Tensor:
        """Langevin dynamics of independent replicas.

        Args:
            minutes: after these no chunk is begun; None for all frames.
            frames: of each replica, at most.
            chunk: frames that an interruption loses at most; another one is another simulation.

        Returns:
            Positions in nm, shape `(replicas, frames, 3·atoms)`.
        """
        settings = self.settings
        dynamics = LangevinDynamics(
            temperature=settings.simulated,
            friction=settings.friction,
            chunk=chunk,
            equilibration=100 * chunk,
            seed=settings.seed,
        )
        with self._timed("simulation"):
            found = simulate(
                self.molecule,
                self.output / "md",
                dynamics=dynamics,
                replicas=settings.replicas,
                frames=frames,
                minutes=minutes,
                workers=self.workers,
                progress=self.progress,
            )
            self.history["frames"] = found.shape[0] * found.shape[1]
        self.frames = torch.from_numpy(found)
        return self.frames

    def train(self, *, minutes: float = 10.0, steps: int | None = None) -> list[Curve]:
        """Likelihood of the frames of the simulation.

        Args:
            minutes: how long in all, earlier calls included.
            steps: how many steps in all, instead of the minutes.

        Returns:
            The training curve. The flow is that of its best held-out likelihood.

        Raises:
            FloatingPointError: when the loss is not finite.
            RuntimeError: before `simulate`.
        """
        if not hasattr(self, "frames"):
            raise RuntimeError("there are no frames to train on: simulate() comes first")
        settings = self.settings
        checkpoint, begun = self.output / "training.pt", self.output / "coordinates.pt"
        with self._timed("training"), self._threads():
            training, held_out = self.split()
            # The flow of an interrupted training is one of the features that it began with.
            found = load_checkpoint(begun) if checkpoint.exists() else None
            if found is None:
                # In float64 and at once: more would take gigabytes and tell no more.
                some = training[:: -(-len(training) // 60_000)]
                self._set_up(some, self._equal_rotors(some))
                self.save(begun)
            else:
                self._restore(found)
            loop = Training(
                self.flow,
                self._features(training),
                self._features(held_out),
                batch=settings.batch,
                learning_rate=settings.learning_rate,
                noise=settings.noise,
                weight_decay=settings.weight_decay,
                circular=self.coordinates.circular,
                seed=settings.seed,
                checkpoint=checkpoint,
            )
            # Another number of threads would be another order of sums.
            loop.choose_threads(self.workers if steps is None else 1)
            with progress_bar("training", self.progress) as bar:
                self.curve = loop.run(minutes, steps, bar)
            self.history["steps"] = loop.step
        self.save(self.output / "generator.pt")
        return self.curve

    def refine(
        self,
        *,
        minutes: float = 10.0,
        rounds: int = 8,
        steps: int | None = None,
        samples: int | None = None,
    ) -> None:
        """Energies: the generator learns from its own reweighted samples.

        In each round it draws, reweights to the round's temperature, and trains on what it has
        drawn, beside the frames where these are of the same temperature. The first half of the
        rounds goes down to the temperature of the settings.

        Args:
            minutes: how long, all rounds together.
            rounds: how many; those of an earlier call are not done again.
            steps: training steps of each round, instead of the minutes.
            samples: drawn in each round; by default what a third of the minutes is enough for.
        """
        settings, file = self.settings, self.output / "refining.pt"
        hot, cold = settings.simulated, settings.temperature
        done = load_checkpoint(file) or {}
        if done.get("after") != self.history.get("steps"):
            # There are none, or those of a training that has gone on since.
            after = self.history.get("steps")
            done = {"rounds": [], "pool": None, "temperature": hot, "after": after}
        if done["rounds"]:
            self.flow.load_state_dict(done["flow"])
        training, judges = (self._features(frames) for frames in self.split())
        cooling = max(1, rounds // 2) if cold < hot else 1
        seconds = 60.0 * minutes / max(1, rounds - len(done["rounds"]))
        for index in range(len(done["rounds"]), rounds):
            with self._timed("refinement"), self._threads():
                begin = time.perf_counter()
                temperature = hot * (cold / hot) ** (min(index + 1, cooling) / cooling)
                torch.manual_seed(1_000 * (settings.seed + 1) + index)
                count = samples or int(np.clip(0.33 * seconds / self._price(), 5_000, 200_000))
                drawn = self._draw(count, temperature)
                size = effective_sample_size(drawn.log_weights, clip=CLIP)
                # As many as they are worth; some of them judge where no frames do.
                own = resampled(drawn.features, drawn.log_weights, clip=CLIP)
                own = own[: max(100, int(size * count))]
                held_out, own = own[: len(own) // 10], own[len(own) // 10 :]
                pool = done["pool"]
                if math.isclose(temperature, hot):
                    held_out, pool = judges, training if pool is None else pool
                elif not math.isclose(temperature, done["temperature"]):
                    pool = own[:0]
                pool = torch.cat([pool, own])
                loop = Training(
                    self.flow,
                    pool,
                    held_out,
                    batch=settings.batch,
                    learning_rate=0.5 * settings.learning_rate,
                    noise=0.5 * settings.noise,
                    weight_decay=settings.weight_decay,
                    span=(index / rounds, (index + 1) / rounds),
                    circular=self.coordinates.circular,
                    seed=settings.seed + index + 1,
                )
                loop.choose_threads(self.workers if steps is None else 1)
                # What a round starts from is kept where held-out rows like it best.
                loop.look()
                left = max(1.0, seconds - (time.perf_counter() - begin)) / 60.0
                title = f"round {index + 1} of {rounds}, {temperature:.0f} K"
                with progress_bar(title, self.progress) as bar:
                    loop.run(left, steps, bar)
                done["rounds"].append([temperature, size, count])
                done |= {"pool": pool, "temperature": temperature, "flow": self.flow.state_dict()}
                save_checkpoint(file, done)
        self.history["rounds"] = done["rounds"]
        self.save(self.output / "generator.pt")

    def sample(self, samples: int = 100_000) -> WeightedSamples:
        """Structures with weights, and the files samples.npz, samples.pdb and samples.dcd.

        The weighted ones are in samples.npz. Those of samples.dcd are drawn from them with their
        weights, so that all count alike.

        Args:
            samples: how many.

        Returns:
            `WeightedSamples` at the temperature of the settings.

        Raises:
            ValueError: when all weights are zero.
        """
        with self._timed("sampling"), self._threads():
            torch.manual_seed(self.settings.seed + 1)
            self.samples = found = self._draw(samples, self.settings.temperature)
        if not bool(found.log_weights.isfinite().any()):
            raise ValueError(
                f"none of {samples} samples has a weight: train longer, on more frames"
            )
        weights = torch.softmax(found.log_weights.double(), 0).numpy()
        arrays = {name: rows.numpy() for name, rows in found._asdict().items()}
        arrays["weights"] = weights
        write_whole(self.output / "samples.npz", lambda aside: np.savez(aside, **arrays))
        # Systematic draws: each as often as its weight has it, up to one.
        count = min(10_000, samples)
        places = (np.arange(count) + np.random.default_rng(self.settings.seed).random()) / count
        rows = np.searchsorted(np.cumsum(weights), places).clip(max=samples - 1)
        equal = self.molecule.trajectory(found.positions.numpy()[rows])
        write_whole(self.output / "samples.pdb", lambda aside: equal[0].save_pdb(str(aside)))
        write_whole(self.output / "samples.dcd", lambda aside: equal.save_dcd(str(aside)))
        return found

    def report(self) -> dict[str, Any]:
        """Write summary.json, report.html, report.md and its figures.

        Returns:
            What summary.json has.

        Raises:
            RuntimeError: before `simulate` and `sample`.
        """
        from p4flows.molecules.report import write_report

        if not (hasattr(self, "frames") and hasattr(self, "samples")):
            raise RuntimeError("there is nothing to report: simulate() and sample() come first")
        return write_report(self)

    def run(self, minutes: float) -> dict[str, Any]:
        """All steps within so many minutes, those of earlier calls included.

        A third goes to frames and some half of what is left to likelihood. The rest goes to
        energies, when the effective sample size is in tens of percent and there is time for rounds
        of 400 steps, or when the temperature is to fall; else to more frames, if the training
        overfitted, and more likelihood. A tenth is left for samples and the report.

        Args:
            minutes: wall-clock time of all steps.

        Returns:
            What summary.json has.
        """
        cold, end = self.settings.temperature < self.settings.simulated, 0.9 * minutes
        left = 0.35 * minutes - self.spent("simulation")
        self.simulate(minutes=max(0.0, left), frames=60_000)
        share = 0.55 if cold else 0.7
        # What the simulation takes longer is the training's loss.
        self.train(minutes=max(0.1 * minutes, share * (end - self.spent("simulation"))))
        size = self.history["ess_of_likelihood"] = self._trial(self.settings.simulated)
        left = max(0.05 * minutes, end - self.spent("simulation", "training", "refinement"))
        step = self.curve[-1].seconds / self.curve[-1].step
        rounds = min(12 if cold else 8, int(60.0 * left * _TRAINED / (_ROUND * step)))
        if cold or (size >= REFINABLE and rounds > 1):
            before = copy.deepcopy(self.flow.state_dict())
            self.refine(minutes=left, rounds=max(2, rounds))
            if not cold and self._trial(self.settings.temperature) < size:
                self.flow.load_state_dict(before)
                self.save(self.output / "generator.pt")
                self.history["refinement"] = "undone: it lowered the effective sample size"
        else:
            if self.curve[-1].held_out - self.curve[-1].training > OVERFITTED:
                self.simulate(minutes=0.5 * left, frames=10 * self.frames.shape[1])
            self.train(minutes=max(self.spent("training"), end - self.spent("simulation")))
        self.sample(int(np.clip(0.05 * 60.0 * minutes / self._price(), 10_000, 500_000)))
        return self.report()

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the trained generator to a file that `load` reads.

        Args:
            file: the path.
        """
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
        """A trained generator from the file that `save` has written, generator.pt for instance.

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
            raise ValueError(f"{path} must be the file of a generator, got another checkpoint")
        atoms = pandas.read_json(io.StringIO(found["atoms"]), dtype={"segmentID": str})
        topology = mdtraj.Topology.from_dataframe(atoms, found["bonds"].numpy()).to_openmm()
        system = openmm.XmlSerializer.deserialize(found["system"])
        molecule = Molecule(found["name"], system, topology, found["positions"].numpy())
        settings = Settings(**found["settings"])
        generator = cls(molecule, path.parent if output is None else output, settings)
        generator._restore(found)
        return generator

    def spent(self, *steps: str) -> float:
        """Minutes that steps have taken, in earlier calls as well.

        Args:
            steps: "simulation", "training", "refinement", "sampling"; none for all.

        Returns:
            Their sum.
        """
        seconds = self.history["seconds"]
        return sum(seconds.get(step, 0.0) for step in steps or seconds) / 60.0

    def split(self) -> tuple[Tensor, Tensor]:
        """Frames of the training, and the last tenth of each replica, which it is judged by."""
        first = max(1, self.frames.shape[1] * 9 // 10)
        parts = (self.frames[:, :first].flatten(0, 1), self.frames[:, first:].flatten(0, 1))
        training, held_out = (rows[self.same_isomer(rows)] for rows in parts)
        return training, held_out

    def same_isomer(self, positions: Tensor) -> Tensor:
        """Which structures have each peptide bond cis or trans as the molecule starts.

        A peptide bond turns too rarely for a simulation to tell how often: other frames are left
        out, and other samples have weight zero.

        Args:
            positions: in nm, shape `(N, 3·atoms)`.

        Returns:
            A bool tensor of shape `(N,)`.
        """
        start = self.molecule.positions.reshape(1, -1)
        both = self.molecule.trajectory(np.concatenate([start, positions.numpy()]))
        trans = np.abs(mdtraj.compute_dihedrals(both, self._omega, periodic=False)) > math.pi / 2
        return torch.from_numpy((trans[1:] == trans[:1]).all(-1))

    def frame_log_weights(self, frames: Tensor) -> Tensor:
        """Log-weights of frames of the simulation, with the constant of the samples'.

        Args:
            frames: in nm, shape `(N, 3·atoms)`.

        Returns:
            Shape `(N,)`.
        """
        energy = OpenMMEnergy(self.molecule.system, self.settings.simulated)
        return log_weights_of(self.flow, self.coordinates, energy, frames)

    def _equal_rotors(self, frames: Tensor) -> list[Rotor]:
        """Groups whose turn changes the energy by less than k_BT, most of them by nothing.

        Improper torsions of Amber's depend on the order of equivalent atoms: weights account for
        that, because samples come with their atoms in any order.
        """
        few = frames[:: max(1, len(frames) // 100)].double()
        energy = OpenMMEnergy(self.molecule.system, self.settings.simulated)
        atoms = list(self.molecule.topology.atoms())
        found, changes = [], {}
        for rotor in find_rotors(self.molecule.topology, self.molecule.positions):
            turned = few.unflatten(-1, (-1, 3))[:, list(rotor.permutation)].flatten(1)
            change = (energy(turned) - energy(few)).abs().max().item()
            centre = atoms[rotor.axis[1]]
            changes[f"{centre.name} of {centre.residue.name}{centre.residue.index}"] = change
            if change < 1.0:
                found.append(rotor)
        self.history["rotors"] = changes
        return found

    def _set_up(self, frames: Tensor, rotors: list[Rotor]) -> None:
        """New coordinates and a new flow."""
        self.coordinates = MixedCoordinateTransform(
            frames, self.molecule.topology, rotors=rotors, circular=True
        )
        # Enough to make such coordinates again, whose numbers a file has.
        self._reference = frames[:: max(1, len(frames) // 200)].clone()
        self._new_flow()

    def _restore(self, found: dict[str, Any]) -> None:
        """Coordinates and flow of a file."""
        self._set_up(found["reference"], [Rotor(*rotor) for rotor in found["rotors"]])
        self.coordinates.load_state_dict(found["coordinates"])
        self._new_flow()
        self.flow.load_state_dict(found["flow"])

    def build_flow(self) -> Flow:
        """The flow at its start; another one can be put in its place by a subclass."""
        return spline_flow(
            self.coordinates.features,
            self.settings.blocks,
            circular=self.coordinates.circular,
            hidden=self.settings.hidden,
        )

    def _new_flow(self) -> None:
        torch.manual_seed(self.settings.seed)
        self.flow = self.build_flow().eval()

    @torch.no_grad()
    def _features(self, frames: Tensor) -> Tensor:
        coordinates = self.coordinates
        return torch.cat([coordinates(coordinates.fold(p))[0] for p in frames.split(20_000)])

    def _draw(self, samples: int, temperature: float) -> WeightedSamples:
        energy = OpenMMEnergy(self.molecule.system, temperature)
        found = weighted_samples(self.flow, self.coordinates, energy, samples)
        other = ~self.same_isomer(found.positions)
        return found._replace(log_weights=found.log_weights.masked_fill(other, -math.inf))

    def _trial(self, temperature: float) -> float:
        """Effective sample size, clipped, of some samples."""
        return effective_sample_size(self._draw(10_000, temperature).log_weights, clip=CLIP)

    def _price(self) -> float:
        """Seconds of a sample with its energy."""
        begin = time.perf_counter()
        self._draw(2_000, self.settings.temperature)
        return (time.perf_counter() - begin) / 2_000

    def _claim_folder(self) -> None:
        file = self.output / "settings.json"
        own = {"molecule": self.molecule.name, "atoms": self.molecule.atoms}
        # As JSON has it, in which a tuple is a list.
        self._own = own | json.loads(json.dumps(dataclasses.asdict(self.settings)))
        if not file.exists():
            self._note()
            return
        try:
            found = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is garbled ({error}): take another folder") from error
        for name, value in self._own.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{self.output} is of another run, with {name} {found.get(name)} and not "
                    f"{value}: take another folder"
                )
        self.history = found.get("history", self.history)

    def _note(self) -> None:
        text = json.dumps(self._own | {"history": self.history}, indent=1)
        write_whole(self.output / "settings.json", lambda aside: aside.write_text(text))

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
