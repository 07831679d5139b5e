"""Z-matrices of chains, rings, branches and of alanine dipeptide."""

import pytest

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
mdtraj = pytest.importorskip("mdtraj", reason="needs the extra `molecules`")


def topology_of(elements, bonds):
    topology = mdtraj.Topology()
    residue = topology.add_residue("MOL", topology.add_chain())
    atoms = [
        topology.add_atom(symbol, mdtraj.element.get_by_symbol(symbol), residue)
        for symbol in elements
    ]
    for first, second in bonds:
        topology.add_bond(atoms[first], atoms[second])
    return topology


WATER = topology_of("OHH", [(0, 1), (0, 2)])
HYDROGEN_PEROXIDE = topology_of("HOOH", [(0, 1), (1, 2), (2, 3)])
RING = topology_of("CCCCCC", [(i, (i + 1) % 6) for i in range(6)])
NEOPENTANE = topology_of("CCCCC", [(0, i) for i in range(1, 5)])


@pytest.mark.parametrize(
    "topology", [WATER, HYDROGEN_PEROXIDE, RING, NEOPENTANE], ids=["water", "h2o2", "ring", "star"]
)
def test_every_atom_is_placed_once_by_atoms_that_are_placed_before(topology):
    z_matrix = molecules.find_z_matrix(topology)
    placed = list(z_matrix.block)
    for atom, *references in z_matrix.rows:
        assert set(references) <= set(placed)
        assert len({atom, *references}) == 4
        placed.append(atom)
    assert sorted(placed) == list(range(topology.n_atoms))


def test_lengths_are_bonds_and_angles_are_between_bonds(molecule):
    bonds = {frozenset((a.index, b.index)) for a, b in molecule.topology.bonds()}
    for block in (None, [4, 6, 8, 14, 16]):
        rows = molecules.find_z_matrix(molecule.topology, block).rows
        assert len(rows) == 17
        for atom, bond, angle, torsion in rows:
            assert {frozenset((atom, bond)), frozenset((bond, angle))} <= bonds
            assert frozenset((torsion, angle)) in bonds or frozenset((torsion, bond)) in bonds


def test_one_torsion_turns_a_methyl_group(molecule):
    rows = {row[0]: row for row in molecules.find_z_matrix(molecule.topology).rows}
    first, *others = (rows[atom] for atom in (11, 12, 13))
    assert first[3] not in (11, 12, 13)
    assert [row[3] for row in others] == [11, 11]


def test_phi_and_psi_are_torsions_of_alanine_dipeptide(molecule):
    z_matrix = molecules.find_z_matrix(molecule.topology)
    trajectory = molecule.trajectory(molecule.positions)
    for compute in (mdtraj.compute_phi, mdtraj.compute_psi):
        torsion = tuple(compute(trajectory)[0][0].tolist())
        assert {torsion, torsion[::-1]} & set(z_matrix.rows)


def test_topologies_of_openmm_and_mdtraj_agree(molecule):
    theirs = mdtraj.Topology.from_openmm(molecule.topology)
    assert molecules.find_z_matrix(theirs) == molecules.find_z_matrix(molecule.topology)


def test_order_of_a_given_block_does_not_matter(molecule):
    forward, backward = [6, 8, 14], [14, 8, 6]
    assert molecules.find_z_matrix(molecule.topology, forward) == molecules.find_z_matrix(
        molecule.topology, backward
    )


@pytest.mark.parametrize(
    ("topology", "block", "message"),
    [
        (topology_of("HH", [(0, 1)]), None, "at least 3 atoms, got 2"),
        (topology_of("OHHO", [(0, 1), (0, 2)]), None, r"no path of bonds from atom 0 to atoms \[3"),
        (RING, [0, 1], "at least 3 different atoms"),
        (RING, [0, 1, 1], "at least 3 different atoms"),
        (RING, [0, 1, 6], "atoms from 0 to 5"),
        (RING, [0, 1, 3], "connected by bonds"),
    ],
)
def test_what_has_no_z_matrix_is_refused(topology, block, message):
    with pytest.raises(ValueError, match=message):
        molecules.find_z_matrix(topology, block)


def test_other_topologies_are_refused():
    with pytest.raises(TypeError, match="OpenMM or mdtraj Topology, got str"):
        molecules.find_z_matrix("CCO")
