"""Boltzmann generators of molecules (paper, Section 4.3); needs the extra `molecules`."""

from p4flows.molecules.dynamics import LangevinDynamics, simulate
from p4flows.molecules.energy import OpenMMEnergy
from p4flows.molecules.losses import energy_loss, mixed_loss
from p4flows.molecules.mixed import MixedCoordinateTransform
from p4flows.molecules.reweighting import (
    effective_sample_size,
    free_energy_difference,
    sample_with_weights,
)
from p4flows.molecules.states import StateStatistics, phi_psi, state_statistics
from p4flows.molecules.system import Molecule, alanine_dipeptide
from p4flows.molecules.z_matrix import ZMatrix, find_z_matrix

__all__ = [
    "LangevinDynamics",
    "MixedCoordinateTransform",
    "Molecule",
    "OpenMMEnergy",
    "StateStatistics",
    "ZMatrix",
    "alanine_dipeptide",
    "effective_sample_size",
    "energy_loss",
    "find_z_matrix",
    "free_energy_difference",
    "mixed_loss",
    "phi_psi",
    "sample_with_weights",
    "simulate",
    "state_statistics",
]
