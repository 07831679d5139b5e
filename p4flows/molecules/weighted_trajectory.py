"""Samples with weights as files that mdtraj reads."""

import os
from pathlib import Path

import mdtraj
import numpy as np
import torch
from torch import Tensor

from p4flows.molecules.system import Molecule


def save_weighted(
    molecule: Molecule, stem: str | os.PathLike[str], positions: Tensor, log_weights: Tensor
) -> None:
    """Write STEM.pdb, STEM.dcd and STEM.npz: topology, structures and their weights.

    Args:
        molecule: gives the topology.
        stem: the path without a suffix.
        positions: in nm, shape `(samples, 3·atoms)`.
        log_weights: shape `(samples,)`; the file takes weights that add up to one as `weights`.

    Raises:
        ValueError: when the numbers of structures and weights differ.

    Example:
        >>> import tempfile
        >>> from p4flows.molecules import alanine_dipeptide
        >>> molecule = alanine_dipeptide()
        >>> positions = torch.tensor(molecule.positions).reshape(1, -1).repeat(3, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weighted(molecule, folder + "/samples", positions, torch.zeros(3))
        ...     trajectory, weights = load_weighted(folder + "/samples")
        >>> trajectory.n_frames, weights.sum().round(6)
        (3, np.float64(1.0))
    """
    if log_weights.shape != (len(positions),):
        raise ValueError(
            f"log_weights must have shape ({len(positions)},), got {tuple(log_weights.shape)}"
        )
    path = Path(stem)
    structures = molecule.trajectory(positions.detach().cpu().numpy())
    structures[0].save_pdb(str(path.with_name(path.name + ".pdb")))
    structures.save_dcd(str(path.with_name(path.name + ".dcd")))
    weights = torch.softmax(log_weights.detach().double(), 0).cpu().numpy()
    np.savez(path.with_name(path.name + ".npz"), weights=weights)


def load_weighted(stem: str | os.PathLike[str]) -> tuple[mdtraj.Trajectory, np.ndarray]:
    """Read what `save_weighted` has written.

    Args:
        stem: the path without a suffix.

    Returns:
        The trajectory and the weights, which add up to one, shape `(samples,)`.
    """
    path = Path(stem)
    structures = mdtraj.load(
        str(path.with_name(path.name + ".dcd")), top=str(path.with_name(path.name + ".pdb"))
    )
    with np.load(path.with_name(path.name + ".npz")) as found:
        return structures, found["weights"]
