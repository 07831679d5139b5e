"""What examples/boltzmann_generator.py is about: the molecule, its frames, its coordinates."""

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import torch
from ramachandran import is_trans
from replica_exchange import replica_exchange
from torch import Tensor

from p4flows.molecules import (
    LangevinDynamics,
    MixedCoordinateTransform,
    Molecule,
    OpenMMEnergy,
    alanine_dipeptide,
    capped_alanines,
    methyl_rotations,
    phi_psi,
    simulate,
)

MOLECULES = {
    "alanine_dipeptide": alanine_dipeptide,
    "tetrapeptide": lambda: capped_alanines(4),
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """Everything that determines a run, but the seed and what mixes the columns.

    The first `steps` learn from frames at `temperature`; `rounds` of the energy-based stage follow,
    the first `cooling` of which go down to `last_temperature`. Each draws `round_samples` from the
    flow. One learning rate decays on a cosine over all of it.
    """

    molecule: str = "alanine_dipeptide"
    temperature: float = 600.0  # K
    # 1/ps. With 1/ps the energies of frames 100 fs apart are alike for a picosecond, and torsions
    # turn no faster than with 10/ps.
    friction: float = 10.0
    replicas: int = 4
    frames: int = 25_000
    blocks: int = 8
    hidden: tuple[int, ...] = (64, 64)
    turn: bool = True  # methyl groups at random in each batch
    steps: int = 1_500
    batch: int = 256
    learning_rate: float = 1e-3
    rounds: int = 3
    round_steps: int = 200
    round_samples: int = 30_000
    cooling: int = 1
    last_temperature: float = 600.0  # K
    samples: int = 100_000
    ensembles: int = 0  # of replica exchange at the last temperature, to compare with
    exchanged: int = 5_000  # frames of each
    orders: int = 1  # of the last methyl groups' hydrogens, for weights of the mean over them
    turned: int = 100_000  # samples with such weights

    @property
    def ladder(self) -> list[float]:
        """Temperatures of the rounds, in equal ratios down to the last one."""
        ratio = self.last_temperature / self.temperature
        steps = [min(number, self.cooling) / self.cooling for number in range(1, self.rounds + 1)]
        return [self.temperature * ratio**step for step in steps]


class Frames:
    """Replicas of a simulation: positions, and which have all peptide bonds trans.

    One turns to cis too rarely for the data to tell how often: such frames are left out.
    """

    def __init__(self, molecule: Molecule, replicas: np.ndarray) -> None:
        self.replicas = torch.from_numpy(replicas)
        self.trans = torch.stack([is_trans(molecule, frames) for frames in self.replicas])

    def __getitem__(self, replicas: slice) -> Tensor:
        """Positions of some replicas, shape (frames, 3·atoms)."""
        return self.replicas[replicas][self.trans[replicas]]


class Problem:
    """The molecule, its frames (the last replica is held out) and the coordinates of the flow."""

    def __init__(self, preset: Preset, output: Path, workers: int, progress: bool = True) -> None:
        self.preset, self.output, self.workers = preset, output, workers
        self.molecule: Molecule = MOLECULES[preset.molecule]()
        self.temperature = preset.temperature
        replicas = simulate(
            self.molecule,
            output / "md",
            dynamics=LangevinDynamics(temperature=preset.temperature, friction=preset.friction),
            replicas=preset.replicas,
            frames=preset.frames,
            workers=workers,
            progress=progress,
        )
        self.simulated = Frames(self.molecule, replicas)
        self.training = self.simulated[:-1]
        self.coordinates = MixedCoordinateTransform(
            self.training, self.molecule.topology, circular=True
        )
        self.turns = methyl_rotations(self.molecule.topology)

    def compared(self, temperature: float) -> tuple[Frames, Tensor] | None:
        """Frames at a temperature, and those of them that no flow has seen; None without any."""
        if math.isclose(temperature, self.temperature):
            return self.simulated, self.simulated[-1:]
        return (self.exchanged, self.exchanged[:]) if self.preset.ensembles else None

    @functools.cached_property
    def exchanged(self) -> Frames:
        """Frames of replica exchange at the last temperature."""
        preset = self.preset
        ladders = replica_exchange(
            self.molecule,
            self.output / "md",
            temperature=preset.last_temperature,
            hottest=preset.temperature,
            ensembles=preset.ensembles,
            frames=preset.exchanged,
            workers=self.workers,
        )
        return Frames(self.molecule, ladders)

    def energy(self, temperature: float) -> OpenMMEnergy:
        """Reduced energies at a temperature."""
        return OpenMMEnergy(self.molecule.system, temperature)

    def torsions(self, positions: Tensor) -> np.ndarray:
        """φ and ψ in radians, shape (frames, 2)."""
        return phi_psi(self.molecule.trajectory(positions.numpy()))
