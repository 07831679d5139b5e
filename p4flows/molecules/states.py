"""Metastable states of trajectories: how often they interchange, how well populations are known."""

import math
from typing import NamedTuple

import mdtraj
import numpy as np
from openmm import app


class StateStatistics(NamedTuple):
    """What replicas of a simulation say about metastable states.

    Attributes:
        populations: share of each state, shape `(states,)`.
        errors: their standard errors, from the scatter between replicas, shape `(states,)`.
        transitions: changes of state along the replicas, of both directions. With fewer than some
            ten, the populations are those of the start positions.
    """

    populations: np.ndarray
    errors: np.ndarray
    transitions: int


def state_statistics(labels: np.ndarray) -> StateStatistics:
    """Populations of states, their statistical errors and the number of transitions.

    Replicas are independent, frames of one are not: the error is the scatter of the replicas'
    populations over √replicas.

    Args:
        labels: state of each frame from 0 on, −1 where a frame is in none (on its way between two),
            integers of shape `(replicas, frames)`.

    Returns:
        A `StateStatistics`.

    Raises:
        TypeError: when the labels are not integers.
        ValueError: when they are not a matrix of at least two replicas.

    Example:
        >>> statistics = state_statistics(np.array([[0, 0, -1, 1], [1, -1, 1, 1]]))
        >>> statistics.populations.round(2).tolist(), statistics.transitions
        ([0.25, 0.5], 1)
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.ndim != 2 or len(labels) < 2:
        raise ValueError(
            f"labels must have shape (replicas, frames) with 2 replicas or more, got {labels.shape}"
        )
    states = range(int(labels.max()) + 1)
    shares = np.stack([(labels == state).mean(1) for state in states], 1)
    visited = [row[row >= 0] for row in labels]
    return StateStatistics(
        populations=shares.mean(0),
        errors=shares.std(0, ddof=1) / math.sqrt(len(labels)),
        transitions=sum(int((np.diff(row) != 0).sum()) for row in visited),
    )


def phi_psi(trajectory: mdtraj.Trajectory) -> np.ndarray:
    """Backbone torsions of the first residue that has both.

    Args:
        trajectory: a peptide.

    Returns:
        φ and ψ in radians, shape `(frames, 2)`.

    Raises:
        ValueError: when no residue has both torsions.

    Example:
        >>> from p4flows.molecules import alanine_dipeptide
        >>> molecule = alanine_dipeptide()
        >>> phi_psi(molecule.trajectory(molecule.positions)).shape
        (1, 2)
    """
    phi, psi = (compute(trajectory)[1] for compute in (mdtraj.compute_phi, mdtraj.compute_psi))
    if phi.shape[1] == 0 or psi.shape[1] == 0:
        raise ValueError("trajectory must have a residue with φ and ψ, got none")
    return np.stack([phi[:, 0], psi[:, 0]], 1)


def peptide_bonds(topology: app.Topology | mdtraj.Topology) -> list[list[int]]:
    """The four atoms of ω of every peptide bond, those to capping groups included.

    Args:
        topology: an OpenMM or mdtraj topology with all bonds.

    Returns:
        (Cα or methyl, C, N, Cα or methyl) of each, by atom number.

    Example:
        >>> from p4flows.molecules import alanine_dipeptide
        >>> peptide_bonds(alanine_dipeptide().topology)
        [[1, 4, 6, 8], [8, 14, 16, 18]]
    """
    if isinstance(topology, app.Topology):
        topology = mdtraj.Topology.from_openmm(topology)
    neighbours: dict[int, list[mdtraj.core.topology.Atom]] = {}
    for first, second in topology.bonds:
        neighbours.setdefault(first.index, []).append(second)
        neighbours.setdefault(second.index, []).append(first)
    found = []
    for first, second in topology.bonds:
        if first.residue is second.residue or {first.name, second.name} != {"C", "N"}:
            continue
        carbonyl, nitrogen = (first, second) if first.name == "C" else (second, first)
        ends = []
        for atom, other in ((carbonyl, nitrogen), (nitrogen, carbonyl)):
            carbons = [
                n for n in neighbours[atom.index] if n.element.symbol == "C" and n is not other
            ]
            ends.append(carbons[0].index)
        found.append([ends[0], carbonyl.index, nitrogen.index, ends[1]])
    return sorted(found)
