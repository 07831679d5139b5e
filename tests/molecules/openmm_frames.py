"""Short simulations for tests."""

import torch


def frames(molecule, count, spacing, temperature=600.0):
    """Frames at a temperature, float64, shape (count, 3·atoms)."""
    import openmm

    integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, 0.001)
    integrator.setRandomNumberSeed(1)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(molecule.system, integrator, platform)
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    context.setVelocitiesToTemperature(temperature, 1)
    positions = []
    for _ in range(count):
        integrator.step(spacing)
        state = context.getState(getPositions=True)
        positions.append(torch.from_numpy(state.getPositions(asNumpy=True)._value).flatten())
    return torch.stack(positions)
