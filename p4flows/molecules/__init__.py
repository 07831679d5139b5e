"""Boltzmann generators of molecules (paper, Section 4.3); needs the extra `molecules`."""

from p4flows.molecules.comparison import (
    energy_distance,
    ramachandran_divergence,
    torus_distance,
)
from p4flows.molecules.dynamics import LangevinDynamics, simulate
from p4flows.molecules.energy import OpenMMEnergy
from p4flows.molecules.losses import energy_loss, mixed_loss
from p4flows.molecules.mixed import MixedCoordinateTransform
from p4flows.molecules.peptide import capped_alanines, molecule_from_pdb
from p4flows.molecules.reweighting import (
    WeightedSamples,
    bootstrap_error,
    clipped,
    effective_sample_size,
    forward_effective_sample_size,
    free_energy_difference,
    kl_divergences,
    log_weights_of,
    resampled,
    sample_with_weights,
    weighted_samples,
)
from p4flows.molecules.states import (
    StateStatistics,
    peptide_bonds,
    phi_psi,
    state_statistics,
)
from p4flows.molecules.symmetry import log_density_of, methyl_rotations, permuted
from p4flows.molecules.system import Molecule, alanine_dipeptide
from p4flows.molecules.weighted_trajectory import load_weighted, save_weighted
from p4flows.molecules.z_matrix import ZMatrix, find_z_matrix

__all__ = [
    "LangevinDynamics",
    "MixedCoordinateTransform",
    "Molecule",
    "OpenMMEnergy",
    "StateStatistics",
    "WeightedSamples",
    "ZMatrix",
    "alanine_dipeptide",
    "bootstrap_error",
    "capped_alanines",
    "clipped",
    "effective_sample_size",
    "energy_distance",
    "energy_loss",
    "find_z_matrix",
    "forward_effective_sample_size",
    "free_energy_difference",
    "kl_divergences",
    "load_weighted",
    "log_density_of",
    "log_weights_of",
    "methyl_rotations",
    "mixed_loss",
    "molecule_from_pdb",
    "peptide_bonds",
    "permuted",
    "phi_psi",
    "ramachandran_divergence",
    "resampled",
    "sample_with_weights",
    "save_weighted",
    "simulate",
    "state_statistics",
    "torus_distance",
    "weighted_samples",
]
