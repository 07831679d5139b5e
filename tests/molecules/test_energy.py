"""OpenMMEnergy: forces, failures of single structures, cap and workers."""

import copy
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

openmm = pytest.importorskip("openmm", reason="needs the extra `molecules`")
molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")


@pytest.fixture
def energy(molecule):
    return molecules.OpenMMEnergy(molecule.system, 600.0)


def test_is_openmm_energy_in_units_of_kt(molecule, frames, energy):
    context = openmm.Context(
        molecule.system,
        openmm.VerletIntegrator(0.001),
        openmm.Platform.getPlatformByName("Reference"),
    )
    expected = []
    for frame in frames[:5]:
        context.setPositions(frame.reshape(22, 3).numpy())
        potential = context.getState(getEnergy=True).getPotentialEnergy()
        expected.append(potential / (openmm.unit.MOLAR_GAS_CONSTANT_R * 600 * openmm.unit.kelvin))
    torch.testing.assert_close(energy(frames[:5]), torch.tensor(expected, dtype=torch.float64))


def test_gradients_are_forces(frames, energy):
    x = frames[:2].clone().requires_grad_()
    weights = torch.tensor([2.0, -0.5], dtype=torch.float64)
    (weights * energy(x)).sum().backward()
    for row, weight in enumerate(weights):
        for column in (0, 17, 65):
            step = torch.zeros_like(frames[row])
            step[column] = 1e-5
            ahead, behind = energy(torch.stack([frames[row] + step, frames[row] - step]))
            expected = weight * (ahead - behind) / 2e-5
            torch.testing.assert_close(x.grad[row, column], expected, rtol=1e-4, atol=1e-3)
            assert expected.abs() > 1e-2


def test_dtype_follows_the_positions(frames, energy):
    narrow = energy(frames[:3].float())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), energy(frames[:3]), rtol=0, atol=1e-2)


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_a_bad_structure_does_not_harm_its_batch(molecule, frames, platform):
    energy = molecules.OpenMMEnergy(molecule.system, 600.0, platform=platform)
    batch = frames[:5].clone()
    batch[0, 3] = math.nan
    batch[2] = 0.0  # all atoms in one place
    batch[3, :3] = math.inf
    batch.requires_grad_()
    energies = energy(batch)
    assert energies[[0, 2, 3]].isposinf().all()
    torch.testing.assert_close(energies[[1, 4]], energy(frames[[1, 4]]), rtol=1e-4, atol=1e-3)
    energies[[1, 4]].sum().backward()
    assert (batch.grad[[0, 2, 3]] == 0).all()
    assert (batch.grad[[1, 4]] != 0).all()


def test_a_failing_platform_does_not_harm_the_batch(frames, energy, monkeypatch):
    evaluate = energy.evaluate
    evaluate(frames[:1].numpy())
    evaluator = energy._evaluator

    class Failing:
        def setPositions(self, positions):
            raise openmm.OpenMMException("out of order")

    monkeypatch.setattr(evaluator, "context", Failing())
    energies = energy(frames[:3])
    assert energies[0].isposinf()
    assert energies[1:].isfinite().all()


def test_the_cap_is_smooth_and_bounds_everything(molecule, frames):
    free = molecules.OpenMMEnergy(molecule.system, 600.0)
    capped = molecules.OpenMMEnergy(molecule.system, 600.0, cap=(20.0, 1e6))
    low, high = frames[:1], frames[:1] + 0.01 * torch.randn(1, 66, dtype=torch.float64)
    assert free(low) < 20.0 < free(high) < 1e6
    torch.testing.assert_close(capped(low), free(low))
    torch.testing.assert_close(capped(high), 20.0 + torch.log1p(free(high) - 20.0))
    broken = torch.stack([torch.zeros(66), torch.full((66,), math.nan)]).requires_grad_()
    energies = capped(broken)
    torch.testing.assert_close(energies, torch.full((2,), 20.0 + math.log1p(1e6 - 20.0)))
    energies.sum().backward()
    assert (broken.grad == 0).all()

    x = high.clone().requires_grad_()
    capped(x).sum().backward()
    y = high.clone().requires_grad_()
    free(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad / (1.0 + free(high) - 20.0))


def test_workers_give_the_same(molecule, frames, energy):
    batch = frames[:7].numpy()
    with molecules.OpenMMEnergy(molecule.system, 600.0, workers=2) as shared:
        for found, expected in zip(shared.evaluate(batch), energy.evaluate(batch), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert energy(frames[:0]).shape == shared(frames[:0]).shape == (0,)


def test_killed_workers_are_replaced(molecule, frames, energy):
    batch = frames[:4].numpy()
    expected = energy.evaluate(batch)
    with molecules.OpenMMEnergy(molecule.system, 600.0, workers=2) as shared:
        shared.evaluate(batch)
        victims = set(shared._pool._processes)
        # All of them: one that is left alone may finish the batch before anyone notices.
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        with pytest.warns(UserWarning, match="a worker process died"):
            found = shared.evaluate(batch)
        assert not victims & set(shared._pool._processes)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


PARENT = """
import os, signal, numpy
from p4flows.molecules import OpenMMEnergy, alanine_dipeptide
if __name__ == "__main__":
    molecule = alanine_dipeptide()
    energy = OpenMMEnergy(molecule.system, 600.0, workers=2)
    energy.evaluate(numpy.stack([molecule.positions.ravel()] * 2))
    print(*energy._pool._processes, flush=True)
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


def test_copies_evaluate_too(frames, energy):
    expected = energy(frames[:2])
    torch.testing.assert_close(copy.deepcopy(energy)(frames[:2]), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"system": None}, TypeError, "openmm.System, got NoneType"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0"),
        ({"workers": -1}, ValueError, "workers must not be negative, got -1"),
        ({"workers": 1.0}, TypeError, "workers must be an int, got float"),
        ({"platform": "Abacus"}, ValueError, r"platform must be one of \['Reference'.*'Abacus'"),
        ({"cap": (5.0, 5.0)}, ValueError, r"low < high, got \(5.0, 5.0\)"),
    ],
)
def test_bad_arguments_are_refused(molecule, arguments, error, message):
    with pytest.raises(error, match=message):
        molecules.OpenMMEnergy(**{"system": molecule.system, "temperature": 600.0, **arguments})


def test_wrong_shapes_are_refused(energy):
    with pytest.raises(ValueError, match=r"shape \(N, 66\), got \(2, 22, 3\)"):
        energy(torch.zeros(2, 22, 3))
