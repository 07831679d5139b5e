"""Boltzmann generators of molecules (paper, Section 4.3); needs the extra `molecules`."""

from p4flows.molecules.dynamics import LangevinDynamics, simulate
from p4flows.molecules.energy import OpenMMEnergy
from p4flows.molecules.generator import BoltzmannGenerator, Settings
from p4flows.molecules.losses import energy_loss, mixed_loss
from p4flows.molecules.mixed import MixedCoordinateTransform
from p4flows.molecules.peptide import capped_peptide, molecule_from_pdb
from p4flows.molecules.reweighting import (
    WeightedSamples,
    effective_sample_size,
    forward_effective_sample_size,
    free_energy_difference,
    log_weights_of,
    sample_with_weights,
    weighted_samples,
)
from p4flows.molecules.states import StateStatistics, phi_psi, state_statistics
from p4flows.molecules.system import Molecule, alanine_dipeptide
from p4flows.molecules.topology import Rotor, find_rotors, peptide_bonds
from p4flows.molecules.z_matrix import ZMatrix, find_z_matrix

__all__ = [
    "BoltzmannGenerator",
    "LangevinDynamics",
    "MixedCoordinateTransform",
    "Molecule",
    "OpenMMEnergy",
    "Rotor",
    "Settings",
    "StateStatistics",
    "WeightedSamples",
    "ZMatrix",
    "alanine_dipeptide",
    "capped_peptide",
    "effective_sample_size",
    "energy_loss",
    "find_rotors",
    "find_z_matrix",
    "forward_effective_sample_size",
    "free_energy_difference",
    "log_weights_of",
    "mixed_loss",
    "molecule_from_pdb",
    "peptide_bonds",
    "phi_psi",
    "sample_with_weights",
    "simulate",
    "state_statistics",
    "weighted_samples",
]
