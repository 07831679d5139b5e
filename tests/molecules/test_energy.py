"""OpenMMEnergy: forces, units, failures of single structures."""

import copy
import math

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
    class Failing:
        def setPositions(self, positions):
            raise openmm.OpenMMException("out of order")

    monkeypatch.setattr(energy, "_context", Failing())
    energies = energy(frames[:3])
    assert energies[0].isposinf()
    assert energies[1:].isfinite().all()


def test_temperature_may_be_a_quantity(molecule, frames, energy):
    with_unit = molecules.OpenMMEnergy(molecule.system, 600 * openmm.unit.kelvin)
    torch.testing.assert_close(with_unit(frames[:2]), energy(frames[:2]))


def test_copies_evaluate_too(frames, energy):
    expected = energy(frames[:2])
    torch.testing.assert_close(copy.deepcopy(energy)(frames[:2]), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"system": None}, TypeError, "openmm.System, got NoneType"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0"),
        ({"temperature": "warm"}, TypeError, "a quantity is needed, got 'warm'"),
        ({"platform": "Abacus"}, ValueError, r"platform must be one of \['Reference'.*'Abacus'"),
    ],
)
def test_bad_arguments_are_refused(molecule, arguments, error, message):
    with pytest.raises(error, match=message):
        molecules.OpenMMEnergy(**{"system": molecule.system, "temperature": 600.0, **arguments})


def test_wrong_shapes_are_refused(energy):
    with pytest.raises(ValueError, match=r"shape \(N, 66\), got \(2, 22, 3\)"):
        energy(torch.zeros(2, 22, 3))
