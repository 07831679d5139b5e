"""Frames of alanine dipeptide for all tests of molecules."""

import pytest
import torch


@pytest.fixture(scope="session")
def molecule():
    from p4flows.molecules import alanine_dipeptide

    return alanine_dipeptide()


@pytest.fixture(scope="session")
def frames(molecule):
    """400 frames at 600 K, 20 fs apart, float64, shape (400, 66)."""
    import openmm

    integrator = openmm.LangevinMiddleIntegrator(600.0, 1.0, 0.001)
    integrator.setRandomNumberSeed(1)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(molecule.system, integrator, platform)
    context.setPositions(molecule.positions)
    context.setVelocitiesToTemperature(600.0, 1)
    positions = []
    for _ in range(400):
        integrator.step(20)
        state = context.getState(getPositions=True)
        positions.append(torch.from_numpy(state.getPositions(asNumpy=True)._value).flatten())
    return torch.stack(positions)
