"""Langevin dynamics of independent replicas, kept on disk: resumable, never computed twice."""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
from openmm import unit
from tqdm.auto import tqdm

from p4flows.arguments import check_positive_int
from p4flows.molecules.storage import write_whole
from p4flows.molecules.system import Molecule, number


@dataclasses.dataclass(frozen=True)
class LangevinDynamics:
    """Everything that determines the frames of a replica, but the molecule.

    Attributes:
        temperature: in K.
        timestep: in fs; 1 for a molecule without constraints.
        friction: in 1/ps.
        spacing: steps between frames.
        equilibration: steps before the first frame, after a minimisation.
        chunk: frames of one file; an interrupted run loses at most one chunk of each replica.
        platform: name of the OpenMM platform.
        seed: of the random forces; each replica and chunk has its own stream.

    Raises:
        TypeError: when a count is not an int.
        ValueError: when a value is out of range.

    Example:
        >>> from p4flows.molecules import alanine_dipeptide
        >>> LangevinDynamics(temperature=300.0).folder(alanine_dipeptide())[:-8]
        'alanine_dipeptide-obc2-300K-100fs-seed0-'
    """

    temperature: float = 600.0
    timestep: float = 1.0
    friction: float = 1.0
    spacing: int = 100
    equilibration: int = 50_000
    chunk: int = 1_000
    platform: str = "Reference"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, of in (
            ("temperature", unit.kelvin),
            ("timestep", unit.femtosecond),
            ("friction", unit.picosecond**-1),
        ):
            object.__setattr__(self, name, number(getattr(self, name), of))
        for name in ("spacing", "equilibration", "chunk"):
            check_positive_int(name, getattr(self, name))
        for name in ("temperature", "timestep", "friction"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def folder(self, molecule: Molecule) -> str:
        """A folder name for the frames that these settings give, and no others.

        Args:
            molecule: what is simulated.

        Returns:
            A readable name that ends in a digest of all settings, the system and its positions.
        """
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode())
        digest.update(openmm.XmlSerializer.serialize(molecule.system).encode())
        digest.update(molecule.positions.tobytes())
        readable = f"{molecule.name}-{self.temperature:g}K-{self.spacing * self.timestep:g}fs"
        return f"{readable}-seed{self.seed}-{digest.hexdigest()[:8]}"


def simulate(
    molecule: Molecule,
    directory: str | os.PathLike[str],
    *,
    dynamics: LangevinDynamics = LangevinDynamics(),
    replicas: int = 2,
    frames: int = 10_000,
    minutes: float | None = None,
    workers: int = 2,
    progress: bool = True,
) -> np.ndarray:
    """Simulate independent replicas, or read what has been simulated before.

    The folder `directory/dynamics.folder(molecule)` takes topology.pdb, settings.json and for each
    replica a folder of TRR files, which `mdtraj.load(files, top="topology.pdb")` reads in order.
    A call that asks for more replicas or frames than there are computes the missing ones only, and
    an interrupted call continues with the frames that an uninterrupted one would have given.

    Args:
        molecule: system, topology and start positions.
        directory: where the folders of all settings lie.
        dynamics: the settings.
        replicas: number of independent simulations.
        frames: frames of each replica.
        minutes: after these nothing new is begun, and there are fewer frames than asked for; at
            least one chunk of each replica.
        workers: processes; replicas run side by side.
        progress: whether to show a progress bar.

    Returns:
        Positions in nm, float32, shape `(replicas, frames, 3·atoms)`.

    Raises:
        TypeError: when a count is not an int.
        ValueError: when one is not positive, or a file is torn or does not hold what was written.
        openmm.OpenMMException: when a simulation blows up.
    """
    for name, count in (("replicas", replicas), ("frames", frames), ("workers", workers)):
        check_positive_int(name, count)
    end = math.inf if minutes is None else time.monotonic() + 60.0 * minutes
    folder = Path(directory) / dynamics.folder(molecule)
    chunks = math.ceil(frames / dynamics.chunk)
    files = [[_chunk_file(folder, r, c) for c in range(chunks)] for r in range(replicas)]
    _describe(molecule, dynamics, folder)
    missing = {r: sum(not file.exists() for file in found) for r, found in enumerate(files)}
    if any(missing.values()):
        bar = progress_bar("simulation", progress)
        begin, wanted = time.monotonic(), sum(missing.values())
        idle = {replica for replica, count in missing.items() if count}
        recipe = (molecule, dynamics, folder)
        with bar, start_pool(min(workers, len(idle)), _start_worker, recipe) as pool:
            running: dict[concurrent.futures.Future[None], int] = {}
            while idle or running:
                # Those that are behind first, and no more than there are workers: what has not
                # begun when the time is over does not begin.
                for replica in sorted(idle, key=lambda r: (-missing[r], r)):
                    over = time.monotonic() > end and missing[replica] < chunks
                    if over or not missing[replica]:
                        idle.discard(replica)
                    elif len(running) < workers:
                        idle.discard(replica)
                        running[pool.submit(_advance, replica)] = replica
                done, _ = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    replica = running.pop(future)
                    future.result()
                    missing[replica] -= 1
                    late = (time.monotonic() - begin) / (end - begin) if end > begin else 1.0
                    share = max(late, 1.0 - sum(missing.values()) / wanted)
                    bar.update(min(share, 1.0) - bar.n)
                    there = replicas * chunks - sum(missing.values())
                    bar.set_postfix_str(f"{there * dynamics.chunk:,} frames")
                    idle.add(replica)
    whole = min([f.exists() for f in [*found, folder / "none"]].index(False) for found in files)
    frames = min(frames, whole * dynamics.chunk)
    read = [[_read(file, molecule, dynamics.chunk) for file in found[:whole]] for found in files]
    return np.stack([np.concatenate(one)[:frames].reshape(frames, -1) for one in read])


def start_pool(
    workers: int, initializer: Callable[..., None], arguments: tuple[Any, ...]
) -> concurrent.futures.ProcessPoolExecutor:
    """Fresh processes that end with this one, however it ends: of SIGKILL too."""
    return concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(initializer, arguments),
    )


def _start(initializer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # A terminal sends Ctrl-C to all: the parent lets what is being computed be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def progress_bar(title: str, shown: bool) -> tqdm:
    """A bar from 0 to 1 with the time left."""
    form = "{desc}: {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"
    return tqdm(desc=title, total=1.0, disable=not shown, mininterval=1.0, bar_format=form)


def _chunk_file(folder: Path, replica: int, chunk: int) -> Path:
    return folder / f"replica-{replica:02}" / f"{chunk:04}.trr"


def _read(file: Path, molecule: Molecule, frames: int) -> np.ndarray:
    """The frames of a chunk, checked against what was written; shape (frames, atoms, 3)."""
    remedy = "delete it to have it simulated again"
    try:
        found = mdtraj.load(str(file), top=mdtraj.Topology.from_openmm(molecule.topology)).xyz
    # mdtraj's readers raise whatever they stumble over.
    except Exception as error:
        raise ValueError(f"{file} cannot be read ({error}): {remedy}") from error
    if len(found) != frames:
        raise ValueError(f"{file} must hold {frames} frames, got {len(found)}: {remedy}")
    with np.load(file.with_suffix(".npz")) as state:
        # Absent in folders of an earlier version.
        written = str(state["digest"]) if "digest" in state else _digest(found)
    if not np.isfinite(found).all() or _digest(found) != written:
        raise ValueError(f"{file} holds other frames than were written: {remedy}")
    return found


def _digest(frames: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(frames, dtype=np.float32).tobytes()).hexdigest()


def _describe(molecule: Molecule, dynamics: LangevinDynamics, folder: Path) -> None:
    """Write what a reader of the folder needs."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"molecule": molecule.name, **dataclasses.asdict(dynamics)}
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    molecule.trajectory(molecule.positions).save_pdb(str(folder / "topology.pdb"))


class _Simulation:
    """The chunks of all replicas of one folder, one at a time."""

    def __init__(self, molecule: Molecule, dynamics: LangevinDynamics, folder: Path) -> None:
        self.molecule, self.dynamics, self.folder = molecule, dynamics, folder

    def advance(self, replica: int) -> None:
        """Compute the first chunk of a replica that is not there yet."""
        chunk = 0
        while _chunk_file(self.folder, replica, chunk).exists():
            chunk += 1
        integrator = openmm.LangevinMiddleIntegrator(
            self.dynamics.temperature, self.dynamics.friction, 1e-3 * self.dynamics.timestep
        )
        # A new stream at every chunk, so that positions and velocities are all there is to save.
        seed = _seed(self.dynamics.seed, replica, chunk)
        integrator.setRandomNumberSeed(seed)
        platform = openmm.Platform.getPlatformByName(self.dynamics.platform)
        context = openmm.Context(self.molecule.system, integrator, platform)
        if chunk == 0:
            context.setPositions(self.molecule.positions)
            openmm.LocalEnergyMinimizer.minimize(context)
            context.setVelocitiesToTemperature(self.dynamics.temperature, seed)
            integrator.step(self.dynamics.equilibration)
        else:
            with np.load(self._state_file(replica, chunk - 1)) as state:
                context.setPositions(state["positions"])
                context.setVelocities(state["velocities"])
        frames = np.empty((self.dynamics.chunk, self.molecule.atoms, 3), dtype=np.float32)
        for frame in frames:
            integrator.step(self.dynamics.spacing)
            frame[:] = context.getState(getPositions=True).getPositions(asNumpy=True)._value
        if not np.isfinite(frames).all():
            raise openmm.OpenMMException(
                f"replica {replica} has left the finite numbers in chunk {chunk}: a shorter "
                "timestep, or a better start structure; what came before is kept"
            )
        self._save(replica, chunk, context, frames)

    def _save(self, replica: int, chunk: int, context: openmm.Context, frames: np.ndarray) -> None:
        file = _chunk_file(self.folder, replica, chunk)
        file.parent.mkdir(exist_ok=True)
        state = context.getState(getPositions=True, getVelocities=True)
        np.savez(
            self._state_file(replica, chunk),
            positions=state.getPositions(asNumpy=True)._value,
            velocities=state.getVelocities(asNumpy=True)._value,
            digest=_digest(frames),
        )
        # The chunk counts as there when this file is, so it comes last.
        trajectory = self.molecule.trajectory(frames)
        write_whole(file, lambda aside: trajectory.save_trr(str(aside)))

    def _state_file(self, replica: int, chunk: int) -> Path:
        return _chunk_file(self.folder, replica, chunk).with_suffix(".npz")


def _seed(*stream: int) -> int:
    """A seed for OpenMM from 1 to 2³¹ − 1; zero would be a seed from the clock."""
    return int(np.random.SeedSequence(stream).generate_state(1)[0]) % (2**31 - 1) + 1


_worker: _Simulation


def _start_worker(molecule: Molecule, dynamics: LangevinDynamics, folder: Path) -> None:
    global _worker
    _worker = _Simulation(molecule, dynamics, folder)


def _advance(replica: int) -> None:
    _worker.advance(replica)
