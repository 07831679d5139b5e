"""Boltzmann generators of molecules (paper, Section 4.3); needs the extra `molecules`."""

from p4flows.molecules.energy import OpenMMEnergy
from p4flows.molecules.mixed import MixedCoordinateTransform
from p4flows.molecules.system import Molecule, alanine_dipeptide
from p4flows.molecules.z_matrix import ZMatrix, find_z_matrix

__all__ = [
    "MixedCoordinateTransform",
    "Molecule",
    "OpenMMEnergy",
    "ZMatrix",
    "alanine_dipeptide",
    "find_z_matrix",
]
