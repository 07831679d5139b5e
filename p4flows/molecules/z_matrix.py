"""Z-matrices from a topology: which atoms place which, for any connected molecule."""

from collections.abc import Sequence
from typing import NamedTuple

import networkx

from p4flows.molecules.topology import Topology, bond_graph


class ZMatrix(NamedTuple):
    """How all atoms outside of a Cartesian block are placed.

    Attributes:
        block: atoms that keep Cartesian coordinates, in ascending order.
        rows: (atom, bond, angle, torsion) for each other atom, in an order in which the last three,
            the atoms that its bond length, bond angle and torsion refer to, are placed already.
        closing: for each row, whether its atom closes a ring: it is bonded to `bond` and to
            `angle`, and has both lengths instead of a length and an angle.
    """

    block: tuple[int, ...]
    rows: tuple[tuple[int, int, int, int], ...]
    closing: tuple[bool, ...]


def find_z_matrix(topology: Topology, block: Sequence[int] | None = None) -> ZMatrix:
    """Grow a z-matrix from a block of atoms along the bonds (as Noé et al. 2019).

    The first atom behind a rotatable bond gets a proper torsion; its siblings get their torsion
    relative to it (an improper one), so that one torsion alone turns a whole group: the three
    hydrogens of a methyl group move together. The atom that closes a ring is placed by its two
    bond lengths and a torsion, so that all bonds of the ring are coordinates.

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
            bonds, an atom closes two rings at once, or the block is too small, not connected, or
            names an atom that does not exist.

    Example:
        >>> from p4flows.molecules import alanine_dipeptide
        >>> z_matrix = find_z_matrix(alanine_dipeptide().topology)
        >>> z_matrix.block, len(z_matrix.rows)
        ((6, 8, 9, 10, 14), 17)
    """
    graph = bond_graph(topology)
    if len(graph) < 3:
        raise ValueError(f"topology must have at least 3 atoms, got {len(graph)}")
    apart = sorted(set(graph) - networkx.node_connected_component(graph, 0))
    if apart:
        raise ValueError(
            "topology must be one connected molecule, got no path of bonds from atom 0 to "
            f"atoms {apart[:5]}{' …' if len(apart) > 5 else ''}"
        )
    chosen = _center(graph) if block is None else _checked_block(graph, block)
    return _grow(graph, chosen)


def _center(graph: networkx.Graph) -> tuple[int, ...]:
    """The most central of the atoms with most neighbours, and its neighbours."""
    most = max(degree for _, degree in graph.degree)
    atom = min(
        (a for a, degree in graph.degree if degree == most),
        key=lambda a: (sum(networkx.single_source_shortest_path_length(graph, a).values()), a),
    )
    return tuple(sorted([atom, *graph[atom]]))


def _grow(graph: networkx.Graph, block: tuple[int, ...]) -> ZMatrix:
    """The rows of the z-matrix, breadth first from the block, richest surroundings first."""

    def surroundings(atom: int) -> tuple[int, int, int]:
        heavy = sum(graph.nodes[n]["element"] != "H" for n in graph[atom])
        return (-heavy, -graph.degree[atom], atom)

    placed = list(block)
    rows: list[tuple[int, int, int, int]] = []
    closing = []

    def placed_beside(atom: int, *others: int) -> list[int]:
        return [n for n in sorted(graph[atom], key=surroundings) if n in placed and n not in others]

    for bond in placed:
        for atom in sorted(graph[bond], key=surroundings):
            if atom in placed:
                continue
            ends = placed_beside(atom, bond)
            if len(ends) > 1:
                raise ValueError(
                    f"atom {atom} closes two rings at once, so that one of its bonds would be no "
                    "coordinate: rings that share more than a bond cannot be done"
                )
            angle = (ends or placed_beside(bond))[0]
            # At the bond's other end, or the first one behind the angle's atom.
            torsion = (placed_beside(bond, angle) + placed_beside(angle, bond))[0]
            rows.append((atom, bond, angle, torsion))
            closing.append(bool(ends))
            placed.append(atom)
    return ZMatrix(block, tuple(rows), tuple(closing))


def _checked_block(graph: networkx.Graph, block: Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(sorted(set(map(int, block))))
    if len(chosen) != len(block) or len(chosen) < 3:
        raise ValueError(f"block must hold at least 3 different atoms, got {list(block)}")
    if chosen[0] < 0 or chosen[-1] >= len(graph):
        raise ValueError(f"block must hold atoms from 0 to {len(graph) - 1}, got {list(block)}")
    if not networkx.is_connected(graph.subgraph(chosen)):
        raise ValueError(f"block must be connected by bonds, got {list(block)}")
    return chosen
