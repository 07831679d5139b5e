"""Metastable states of trajectories: how often they interchange, how well populations are known."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import mdtraj
import numpy as np


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


class States(NamedTuple):
    """A partition of a circle by a torsion of one residue: state i is from edge i to edge i + 1.

    `torsion` is its name, `column` its column among those of `torsions_of`, `names` are those of
    the states and `edges` in radians; the last state is what is left.
    """

    torsion: str
    column: int
    names: tuple[str, ...]
    edges: tuple[float, ...]

    def labels(self, torsions: np.ndarray) -> np.ndarray:
        """The state of each structure from its torsions, shape `(..., torsions)` → `(...)`."""
        turned = np.remainder(torsions[..., self.column] - self.edges[0], 2.0 * math.pi)
        found: np.ndarray = np.digitize(turned, np.array(self.edges[1:]) - self.edges[0])
        return found


_KINDS = {
    "φ": mdtraj.compute_phi,
    "ψ": mdtraj.compute_psi,
    "χ1": mdtraj.compute_chi1,
}


def torsions_of(trajectory: mdtraj.Trajectory) -> tuple[list[str], np.ndarray]:
    """Names such as "φ Ser1" of every φ, ψ and χ1, and their radians (frames, torsions)."""
    names, columns = [], []
    for kind, compute in _KINDS.items():
        indices, values = compute(trajectory, periodic=False)
        for atoms, column in zip(indices, values.T, strict=True):
            # Its second atom is of the residue itself but in φ, the third in all.
            residue = trajectory.topology.atom(atoms[2]).residue
            names.append(f"{kind} {residue.name.capitalize()}{residue.index}")
            columns.append(column)
    return names, np.stack(columns, -1) if columns else np.zeros((len(trajectory), 0))


def peptide_states(names: Sequence[str]) -> list[States]:
    """What is slowest to interchange: φ on the right or not, rotamers of χ1."""
    third = 2.0 * math.pi / 3.0
    found = []
    for column, name in enumerate(names):
        first = f"0° ≤ {name} < 120°"
        if name.startswith("φ"):
            found.append(States(name, column, (first, f"{name} elsewhere"), (0.0, third)))
        elif name.startswith("χ1"):
            others = (f"120° ≤ {name} < 240°", f"−120° ≤ {name} < 0°")
            found.append(States(name, column, (first, *others), (0.0, third, 2.0 * third)))
    return found
