"""What a topology says: the graph of bonds, peptide bonds, groups that turn into themselves."""

import itertools
import math
from typing import NamedTuple, TypeAlias

import mdtraj
import networkx
import numpy as np
from networkx.algorithms.isomorphism import GraphMatcher
from openmm import app
from scipy.spatial.transform import Rotation

Topology: TypeAlias = app.Topology | mdtraj.Topology

_ISOMORPHISMS = 64


def bond_graph(topology: Topology) -> networkx.Graph:
    """The bonds between atom numbers, with `element`, `name` and `residue` of each atom."""
    if isinstance(topology, app.Topology):
        atoms, bonds = list(topology.atoms()), list(topology.bonds())
    elif isinstance(topology, mdtraj.Topology):
        atoms, bonds = list(topology.atoms), list(topology.bonds)
    else:
        raise TypeError(
            f"topology must be an OpenMM or mdtraj Topology, got {type(topology).__name__}"
        )
    graph = networkx.Graph()
    for a in atoms:
        element = a.element.symbol if a.element is not None else ""
        graph.add_node(a.index, element=element, name=a.name, residue=a.residue.index)
    graph.add_edges_from((first.index, second.index) for first, second in bonds)
    return graph


def peptide_bonds(topology: Topology) -> list[list[int]]:
    """The four atoms of ω of every peptide bond, those to capping groups included.

    Args:
        topology: an OpenMM or mdtraj topology with all bonds.

    Returns:
        (Cα or methyl, C, N, Cα or methyl) of each, by atom number; mdtraj leaves out the caps.

    Example:
        >>> from p4flows.molecules import alanine_dipeptide
        >>> peptide_bonds(alanine_dipeptide().topology)
        [[1, 4, 6, 8], [8, 14, 16, 18]]
    """
    graph = bond_graph(topology)
    names = graph.nodes(data="name")
    found = []
    for pair in graph.edges:
        carbonyl, nitrogen = sorted(pair, key=lambda atom: names[atom])
        if [names[carbonyl], names[nitrogen]] != ["C", "N"]:
            continue
        if graph.nodes[carbonyl]["residue"] == graph.nodes[nitrogen]["residue"]:
            continue
        ends = []
        for atom, other in ((carbonyl, nitrogen), (nitrogen, carbonyl)):
            carbons = [n for n in graph[atom] if graph.nodes[n]["element"] == "C" and n != other]
            # Proline's nitrogen has two: its Cα comes first in the alphabet.
            ends.append(min(carbons, key=lambda atom: names[atom]))
        found.append([ends[0], carbonyl, nitrogen, ends[1]])
    return sorted(found)


class Rotor(NamedTuple):
    """A group that a turn about a bond takes into itself: methyl, ammonium, carboxylate, phenyl.

    Attributes:
        axis: the bond, (outside of the group, in the group).
        order: 3 for a third of a turn, 2 for half of one.
        permutation: `x[permutation]` has the equivalent atoms of x exchanged as by the turn.
    """

    axis: tuple[int, int]
    order: int
    permutation: tuple[int, ...]


def find_rotors(topology: Topology, positions: np.ndarray) -> list[Rotor]:
    """All groups of a molecule that a turn about a single bond takes into themselves.

    They come from the bonds and elements alone; positions decide which atoms correspond where
    several do, and tell a flat group of two branches from a pyramid, which a turn takes elsewhere.

    Args:
        topology: an OpenMM or mdtraj topology with all bonds.
        positions: any structure, in nm, shape `(atoms, 3)`.

    Returns:
        The rotors, larger groups first: those of two groups, one within the other, are to be turned
        in this order.

    Raises:
        TypeError: when the topology is of another class.

    Example:
        >>> from p4flows.molecules import alanine_dipeptide
        >>> molecule = alanine_dipeptide()
        >>> [rotor.axis for rotor in find_rotors(molecule.topology, molecule.positions)]
        [(4, 1), (8, 10), (16, 18)]
    """
    graph = bond_graph(topology)
    found = []
    for bond in sorted(networkx.bridges(graph)):
        for axis in (bond, bond[::-1]):
            without = graph.copy()
            without.remove_edge(*axis)
            group = without.subgraph(networkx.node_connected_component(without, axis[1]))
            permutation = _turn(group, axis, positions)
            # The smaller side of the bond turns.
            if permutation is not None and 2 * len(group) <= len(graph):
                full = tuple(permutation.get(atom, atom) for atom in range(len(graph)))
                found.append(Rotor(axis, len(group[axis[1]]), full))
    return sorted(found, key=lambda rotor: -sum(i != p for i, p in enumerate(rotor.permutation)))


def _turn(
    group: networkx.Graph, axis: tuple[int, int], positions: np.ndarray
) -> dict[int, int] | None:
    """Which atom each of a group comes upon after a turn about the axis; None when none fits."""
    outside, centre = axis
    branches = sorted(group[centre])
    order = len(branches)
    if order not in (2, 3):
        return None
    along = positions[centre] - positions[outside]
    along /= np.linalg.norm(along)
    arms = {atom: positions[atom] - positions[centre] for atom in group}
    across = [arms[b] - along * (arms[b] @ along) for b in branches]
    if order == 2:
        cosine = across[0] @ across[1] / math.prod(np.linalg.norm(a) for a in across)
        if cosine > -0.8:
            return None
    elif np.linalg.det([along, across[0], across[1]]) < 0:
        branches = branches[::-1]
    turn = Rotation.from_rotvec(along * 2.0 * math.pi / order)
    turned = {atom: turn.apply(arm) for atom, arm in arms.items()}

    def marked(first: int) -> networkx.Graph:
        copy = group.copy()
        marks = {centre: "centre"} | {branches[(first + i) % order]: i for i in range(order)}
        networkx.set_node_attributes(copy, marks, "mark")
        return copy

    matcher = GraphMatcher(
        marked(0),
        marked(1),
        lambda a, b: (a["element"], a.get("mark")) == (b["element"], b.get("mark")),
    )
    candidates = list(itertools.islice(matcher.isomorphisms_iter(), _ISOMORPHISMS))

    def misfit(mapping: dict[int, int]) -> float:
        return float(sum(np.square(turned[a] - arms[b]).sum() for a, b in mapping.items()))

    return min(candidates, key=misfit, default=None)
