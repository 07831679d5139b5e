"""Langevin dynamics: cache, resume, independence of replicas."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

dynamics_module = pytest.importorskip(
    "p4flows.molecules.dynamics", reason="needs the extra `molecules`"
)
molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
mdtraj = pytest.importorskip("mdtraj", reason="needs the extra `molecules`")

DYNAMICS = molecules.LangevinDynamics(spacing=10, equilibration=50, chunk=3)


@pytest.fixture(scope="module")
def complete(molecule, tmp_path_factory):
    """A directory with two replicas of two chunks, and their positions."""
    directory = tmp_path_factory.mktemp("md")
    positions = molecules.simulate(
        molecule, directory, dynamics=DYNAMICS, replicas=2, frames=6, workers=1, progress=False
    )
    return directory, positions


@pytest.fixture
def no_processes(monkeypatch):
    """Whoever simulates fails."""

    def refuse(*arguments, **options):
        raise AssertionError("nothing was left to simulate")

    monkeypatch.setattr(dynamics_module, "start_pool", refuse)


def test_replicas_differ_and_frames_move(complete):
    _, positions = complete
    assert positions.shape == (2, 6, 66)
    assert positions.dtype == np.float32
    assert np.abs(positions[0] - positions[1]).max() > 0.01
    assert (np.abs(np.diff(positions, axis=1)).max(-1) > 1e-3).all()


def test_temperature_is_that_of_the_settings(molecule, complete):
    _, positions = complete
    energies = molecules.OpenMMEnergy(molecule.system, 600.0)(torch.from_numpy(positions[0]))
    at_rest = molecules.OpenMMEnergy(molecule.system, 600.0)(
        torch.from_numpy(molecule.positions.reshape(1, 66))
    )
    # 60 degrees of freedom hold 30 k_BT at most, once they are equilibrated.
    assert (energies > at_rest).all()
    assert (energies < at_rest + 60.0).all()


def test_nothing_is_computed_twice(molecule, complete, no_processes):
    directory, positions = complete
    again = molecules.simulate(
        molecule, directory, dynamics=DYNAMICS, replicas=2, frames=5, progress=False
    )
    np.testing.assert_array_equal(again, positions[:, :5])


def test_a_killed_run_continues_as_if_it_had_not_been(molecule, complete, tmp_path):
    directory, positions = complete
    folder = DYNAMICS.folder(molecule)
    shutil.copytree(directory / folder, tmp_path / folder)
    killed = tmp_path / folder / "replica-01"
    for file in killed.glob("0001.*"):
        file.unlink()
    (killed / "0001.part.trr").write_bytes(b"torn")
    resumed = molecules.simulate(
        molecule, tmp_path, dynamics=DYNAMICS, replicas=2, frames=6, workers=1, progress=False
    )
    np.testing.assert_array_equal(resumed, positions)


def tear(file):
    file.write_bytes(file.read_bytes()[:-40])


def shorten(file):
    # TRR frames of one size: the last one is cut off cleanly.
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 3 * 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tear, r"0001\.trr (cannot be read|must hold 3 frames)"),
        (shorten, r"0001\.trr must hold 3 frames, got 2: delete it"),
        (flip_a_bit, r"0001\.trr holds other frames than were written: delete it"),
    ],
)
def test_a_damaged_file_is_named_and_simulated_again_once_deleted(
    molecule, complete, damage, message, tmp_path
):
    directory, positions = complete
    folder = DYNAMICS.folder(molecule)
    shutil.copytree(directory / folder, tmp_path / folder)
    file = tmp_path / folder / "replica-01" / "0001.trr"
    damage(file)
    arguments = {"dynamics": DYNAMICS, "replicas": 2, "workers": 1, "progress": False}
    with pytest.raises(ValueError, match=message):
        molecules.simulate(molecule, tmp_path, frames=6, **arguments)
    file.unlink()
    again = molecules.simulate(molecule, tmp_path, frames=6, **arguments)
    np.testing.assert_array_equal(again, positions)


def test_only_a_deleted_file_is_simulated_again(molecule, complete, tmp_path):
    directory, positions = complete
    folder = DYNAMICS.folder(molecule)
    shutil.copytree(directory / folder, tmp_path / folder)
    (tmp_path / folder / "replica-00" / "0000.trr").unlink()
    again = molecules.simulate(
        molecule, tmp_path, dynamics=DYNAMICS, replicas=2, frames=6, workers=1, progress=False
    )
    np.testing.assert_array_equal(again, positions)
    assert not (tmp_path / folder / "replica-00" / "0002.trr").exists()


def test_mdtraj_reads_the_files(molecule, complete):
    directory, positions = complete
    folder = directory / DYNAMICS.folder(molecule)
    files = sorted((folder / "replica-01").glob("*.trr"))
    trajectory = mdtraj.load([str(f) for f in files], top=str(folder / "topology.pdb"))
    np.testing.assert_array_equal(trajectory.xyz.reshape(6, 66), positions[1])
    assert "600" in (folder / "settings.json").read_text()


def test_every_setting_has_a_folder_of_its_own(molecule):
    changed = {
        "temperature": 300.0,
        "timestep": 2.0,
        "friction": 5.0,
        "spacing": 11,
        "equilibration": 51,
        "chunk": 4,
        "platform": "CPU",
        "seed": 1,
    }
    assert changed.keys() == {field.name for field in dataclasses.fields(DYNAMICS)}
    variants = [dataclasses.replace(DYNAMICS, **{name: value}) for name, value in changed.items()]
    folders = {variant.folder(molecule) for variant in (DYNAMICS, *variants)}
    folders.add(DYNAMICS.folder(molecules.alanine_dipeptide("vacuum")))
    assert len(folders) == len(changed) + 2
    assert DYNAMICS.folder(molecules.alanine_dipeptide()) == DYNAMICS.folder(molecule)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0"),
        ({"friction": -1.0}, ValueError, "friction must be positive, got -1"),
        ({"spacing": 0}, ValueError, "spacing must be a positive int, got 0"),
        ({"chunk": 1.5}, TypeError, "chunk must be a positive int, got float"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        molecules.LangevinDynamics(**settings)


def test_bad_counts_are_refused(molecule, tmp_path):
    with pytest.raises(ValueError, match="replicas must be a positive int, got 0"):
        molecules.simulate(molecule, tmp_path, replicas=0)


PARENT = """
import os, signal
from p4flows.molecules.dynamics import start_pool
if __name__ == "__main__":
    pool = start_pool(2, print, ())
    list(pool.map(abs, range(20)))
    print(*pool._processes, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    # Orphans would hold the pipe open and keep this waiting.
    run = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=120)
    assert run.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in run.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10.0
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    # A zombie has ended; whoever inherited it has not looked yet.
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
