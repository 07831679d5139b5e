"""The bonds of a topology, OpenMM's or mdtraj's."""

import mdtraj
from openmm import app


def openmm_topology(topology: app.Topology | mdtraj.Topology) -> app.Topology:
    """A topology as OpenMM has it.

    Args:
        topology: an OpenMM or mdtraj topology.

    Returns:
        The same atoms and bonds.

    Raises:
        TypeError: when it is of another class.
    """
    if isinstance(topology, mdtraj.Topology):
        topology = topology.to_openmm()
    if not isinstance(topology, app.Topology):
        raise TypeError(
            f"topology must be an OpenMM or mdtraj Topology, got {type(topology).__name__}"
        )
    return topology


def bonded(topology: app.Topology) -> list[set[int]]:
    """For each atom, those that it has a bond with.

    Args:
        topology: an OpenMM topology.

    Returns:
        Indices of atoms, in the order of the topology.
    """
    neighbours: list[set[int]] = [set() for _ in topology.atoms()]
    for first, second in topology.bonds():
        neighbours[first.index].add(second.index)
        neighbours[second.index].add(first.index)
    return neighbours
