"""Z-matrices from a topology: which atoms place which, for any connected molecule."""

from collections.abc import Sequence
from typing import NamedTuple

import mdtraj
from openmm import app

from p4flows.molecules.bonds import bonded, openmm_topology


class ZMatrix(NamedTuple):
    """How all atoms outside of a Cartesian block are placed.

    Attributes:
        block: atoms that keep Cartesian coordinates, in ascending order.
        rows: (atom, bond, angle, torsion) for each other atom, in an order in which the last three,
            the atoms that its bond length, bond angle and torsion refer to, are placed already.
    """

    block: tuple[int, ...]
    rows: tuple[tuple[int, int, int, int], ...]


def find_z_matrix(
    topology: app.Topology | mdtraj.Topology, block: Sequence[int] | None = None
) -> ZMatrix:
    """Grow a z-matrix from a block of atoms along the bonds (as Noé et al. 2019).

    The first atom behind a rotatable bond gets a proper torsion; its siblings get their torsion
    relative to it (an improper one), so that one torsion alone turns a whole group: the three
    hydrogens of a methyl group move together.

    Args:
        topology: an OpenMM or mdtraj topology with all bonds.
        block: at least three connected atoms. By default the most central of the atoms with most
            neighbours, together with these: in a peptide of one residue, Cα and its four
            neighbours, which is close to rigid.

    Returns:
        A `ZMatrix`.

    Raises:
        TypeError: when the topology is of another class.
        ValueError: when there are fewer than three atoms, the molecule is not connected by its
            bonds, or the block is too small, not connected, or names an atom that does not exist.

    Example:
        >>> from p4flows.molecules import alanine_dipeptide
        >>> z_matrix = find_z_matrix(alanine_dipeptide().topology)
        >>> z_matrix.block, len(z_matrix.rows)
        ((6, 8, 9, 10, 14), 17)
    """
    graph = _BondGraph(openmm_topology(topology))
    chosen = graph.center() if block is None else _checked_block(graph, block)
    return ZMatrix(chosen, graph.grow(chosen))


class _BondGraph:
    """The bonds of a molecule, neighbours with the richest surroundings first."""

    def __init__(self, topology: app.Topology) -> None:
        atoms = list(topology.atoms())
        if len(atoms) < 3:
            raise ValueError(f"topology must have at least 3 atoms, got {len(atoms)}")
        neighbours = bonded(topology)
        heavy = [atom.element is None or atom.element.symbol != "H" for atom in atoms]

        def surroundings(atom: int) -> tuple[int, int, int]:
            return (-sum(heavy[n] for n in neighbours[atom]), -len(neighbours[atom]), atom)

        self.neighbours = [sorted(found, key=surroundings) for found in neighbours]
        unreached = [a for a, d in enumerate(self.distances(0)) if d < 0]
        if unreached:
            raise ValueError(
                f"topology must be one connected molecule, got no path of bonds from atom 0 to "
                f"atoms {unreached[:5]}{' …' if len(unreached) > 5 else ''}"
            )

    def distances(self, start: int) -> list[int]:
        """Number of bonds from an atom to every other, −1 where there is no path."""
        distances = [-1] * len(self.neighbours)
        distances[start] = 0
        queue = [start]
        for atom in queue:
            for neighbour in self.neighbours[atom]:
                if distances[neighbour] < 0:
                    distances[neighbour] = distances[atom] + 1
                    queue.append(neighbour)
        return distances

    def center(self) -> tuple[int, ...]:
        """The most central of the atoms with most neighbours, and its neighbours."""
        most = max(map(len, self.neighbours))
        candidates = [a for a, found in enumerate(self.neighbours) if len(found) == most]
        atom = min(candidates, key=lambda a: (sum(self.distances(a)), a))
        return tuple(sorted([atom, *self.neighbours[atom]]))

    def grow(self, block: tuple[int, ...]) -> tuple[tuple[int, int, int, int], ...]:
        """The rows of the z-matrix, breadth first from the block."""
        placed = list(block)
        rows: list[tuple[int, int, int, int]] = []
        for bond in placed:
            angle = next((n for n in self.neighbours[bond] if n in placed), None)
            assert angle is not None, (
                "a connected block of three atoms gives every atom a neighbour"
            )
            for atom in self.neighbours[bond]:
                if atom not in placed:
                    rows.append((atom, bond, angle, self._torsion_reference(bond, angle, placed)))
                    placed.append(atom)
        return tuple(rows)

    def _torsion_reference(self, bond: int, angle: int, placed: list[int]) -> int:
        """A placed atom at the bond's other end, or the first one behind the angle's atom."""
        beside = [n for n in self.neighbours[bond] if n in placed and n != angle]
        behind = [n for n in self.neighbours[angle] if n in placed and n != bond]
        return (beside + behind)[0]


def _checked_block(graph: _BondGraph, block: Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(sorted(set(map(int, block))))
    atoms = len(graph.neighbours)
    if len(chosen) != len(block) or len(chosen) < 3:
        raise ValueError(f"block must hold at least 3 different atoms, got {list(block)}")
    if chosen[0] < 0 or chosen[-1] >= atoms:
        raise ValueError(f"block must hold atoms from 0 to {atoms - 1}, got {list(block)}")
    reached = [chosen[0]]
    for atom in reached:
        reached += [n for n in graph.neighbours[atom] if n in chosen and n not in reached]
    if len(reached) != len(chosen):
        raise ValueError(f"block must be connected by bonds, got {list(block)}")
    return chosen
