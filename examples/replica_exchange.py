"""Frames at a low temperature, whose replicas exchange temperatures with hotter ones.

Plain dynamics at 300 K crosses a barrier once in ten nanoseconds; hot replicas cross it, and what
they find comes down the ladder (Sugita and Okamoto 1999; OpenMM's sampler).
"""

import os
import random
from pathlib import Path

import numpy as np
import openmm
from experiment import in_processes
from openmm import app

from p4flows.molecules import Molecule

RUNGS = 6
STEPS = 200  # of 1 fs between exchanges, and between frames
EQUILIBRATION = 250  # exchanges before the first frame


def replica_exchange(
    molecule: Molecule,
    directory: Path,
    *,
    temperature: float,
    hottest: float,
    ensembles: int,
    frames: int,
    workers: int,
) -> np.ndarray:
    """Positions at the lowest temperature, of independent ladders; shape (ensembles, frames, 3n).

    A ladder that is done is kept in `directory` and read.
    """
    folder = directory / f"{molecule.name}-exchange-{temperature:g}-{hottest:g}K-{frames}"
    jobs = [(molecule, folder, temperature, hottest, number, frames) for number in range(ensembles)]
    if any(not _file(folder, number).exists() for number in range(ensembles)):
        in_processes(climb, jobs, workers)
    return np.stack([np.load(_file(folder, number)) for number in range(ensembles)])


def climb(
    molecule: Molecule,
    folder: Path,
    temperature: float,
    hottest: float,
    number: int,
    frames: int,
) -> None:
    """One ladder, unless its file is there."""
    file = _file(folder, number)
    if file.exists():
        return
    random.seed(number)  # OpenMM's sampler draws its exchanges there
    integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, 1e-3)
    integrator.setRandomNumberSeed(number + 1)
    platform = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(molecule.topology, molecule.system, integrator, platform)
    simulation.context.setPositions(molecule.positions)
    simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(temperature, number + 1)
    ladder = [{"temperature": float(t)} for t in np.geomspace(temperature, hottest, RUNGS)]
    sampler = app.ReplicaExchangeSampler(ladder, simulation, STEPS)
    sampler.simulate(EQUILIBRATION)
    found = np.empty((frames, 3 * molecule.atoms), dtype=np.float32)
    for frame in found:
        sampler.simulate(1)
        coldest = sampler.replicaConformation[sampler.replicaStateIndex.index(0)]
        frame[:] = coldest.getPositions(asNumpy=True)._value.ravel()
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part.npy")
    np.save(aside, found)
    os.replace(aside, file)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:02}.npy"
