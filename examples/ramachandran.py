"""Torsions of a peptide: trans bonds, the two states of φ, a panel of φ and ψ; in degrees."""

from typing import Any

import mdtraj
import numpy as np
import torch
from torch import Tensor

from p4flows.molecules import Molecule, peptide_bonds

RANGE = (-180.0, 180.0)
TICKS = (-180, -90, 0, 90, 180)
# The two metastable states that are slowest to interchange, by φ.
LEFT, RIGHT = (-180.0, -40.0), (20.0, 110.0)


def is_trans(molecule: Molecule, positions: Tensor) -> Tensor:
    """Frames whose peptide bonds are all trans."""
    trajectory, bonds = molecule.trajectory(positions.numpy()), peptide_bonds(molecule.topology)
    omega = mdtraj.compute_dihedrals(trajectory, bonds, periodic=False)
    return torch.from_numpy((np.abs(omega) > np.pi / 2).all(-1))


def states(torsions: np.ndarray) -> np.ndarray:
    """0 for the left, φ < 0, 1 for the right, −1 for what is between; shape (..., 2) → (...)."""
    phi = torsions[..., 0]
    left = (LEFT[0] <= phi) & (phi < LEFT[1])
    right = (RIGHT[0] <= phi) & (phi < RIGHT[1])
    return np.where(left, 0, np.where(right, 1, -1))


def ramachandran(
    axis: Any, torsions: np.ndarray, title: str, weights: np.ndarray | None = None
) -> None:
    """Free energy −ln p in k_BT above its lowest, from φ and ψ in degrees, shape (frames, 2)."""
    counts, *_ = np.histogram2d(*torsions.T, bins=72, range=[RANGE, RANGE], weights=weights)
    free_energy = -np.log(np.where(counts > 0, counts, np.nan) / counts.max())
    axis.imshow(free_energy.T, origin="lower", extent=RANGE * 2, cmap="viridis_r", vmax=7)
    axis.set(title=title, xlabel="φ", xticks=TICKS, yticks=TICKS[::2])
