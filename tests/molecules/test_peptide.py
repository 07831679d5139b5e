"""Molecules from force-field files."""

import random

import numpy as np
import pytest
import torch

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
mdtraj = pytest.importorskip("mdtraj", reason="needs the extra `molecules`")
unit = pytest.importorskip("openmm.unit", reason="needs the extra `molecules`")
app = pytest.importorskip("openmm.app", reason="needs the extra `molecules`")


@pytest.fixture(scope="module")
def tetrapeptide():
    return molecules.capped_alanines(4)


def write(molecule, file):
    with open(file, "w") as handle:
        app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, handle)


def modeller_of(molecule):
    return app.Modeller(molecule.topology, molecule.positions * unit.nanometer)


def test_capped_alanines_are_extended_and_left_handed(tetrapeptide):
    trajectory = tetrapeptide.trajectory(tetrapeptide.positions)
    phi, psi, omega = (
        np.degrees(compute(trajectory)[1][0])
        for compute in (mdtraj.compute_phi, mdtraj.compute_psi, mdtraj.compute_omega)
    )
    np.testing.assert_allclose(phi, [-140.0] * 4, atol=1.0)
    np.testing.assert_allclose(psi, [135.0] * 4, atol=1.0)
    np.testing.assert_allclose(np.abs(omega), 180.0, atol=1.0)
    atoms = {(a.residue.index, a.name): a.index for a in tetrapeptide.topology.atoms()}
    for residue in range(1, 5):
        n, ca, c, cb = (
            tetrapeptide.positions[atoms[residue, name]] for name in ("N", "CA", "C", "CB")
        )
        assert np.dot(np.cross(n - ca, c - ca), cb - ca) > 0.002


def test_forces_are_native_and_free_of_constraints(tetrapeptide):
    forces = {type(force).__name__ for force in tetrapeptide.system.getForces()}
    assert "GBSAOBCForce" in forces and "CustomGBForce" not in forces
    assert tetrapeptide.system.getNumConstraints() == 0


def test_a_larger_molecule_has_coordinates_and_a_flow(tetrapeptide):
    from p4flows import spline_flow

    torch.manual_seed(0)
    frames = torch.tensor(tetrapeptide.positions).flatten() + 0.003 * torch.randn(200, 156)
    transform = molecules.MixedCoordinateTransform(
        frames.double(), tetrapeptide.topology, circular=True
    )
    features, logabsdet = transform(frames.double())
    positions, inverse_logabsdet = transform.inverse(features)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet)
    assert features.shape == (200, 150) and transform.covers(features).all()
    flow = spline_flow(150, 1, circular=transform.circular).double()
    assert flow.log_prob(features).isfinite().all()
    # Three chiral centres outside of the block, two hydrogens of each of six methyl groups.
    atoms = {atom.index: atom.name for atom in tetrapeptide.topology.atoms()}
    kept = [atoms[row[0]] for row in transform.one_sided()]
    assert sum(name.startswith(("HB", "H", "1H", "2H", "3H")) for name in kept) >= 12
    mirrored = positions.reshape(-1, 52, 3) * torch.tensor([1.0, 1.0, -1.0]).double()
    assert not transform.covers(transform(mirrored.flatten(1))[0]).any()


def test_a_pdb_file_gives_the_molecule_back(tetrapeptide, tmp_path):
    file = tmp_path / "mine.pdb"
    write(tetrapeptide, file)
    molecule = molecules.molecule_from_pdb(file)
    assert molecule.name == "mine" and molecule.atoms == 52
    energies = [
        molecules.OpenMMEnergy(m.system, 300.0)(torch.tensor(tetrapeptide.positions).reshape(1, -1))
        for m in (tetrapeptide, molecule)
    ]
    torch.testing.assert_close(*energies)


def test_several_molecules_are_refused(tetrapeptide, tmp_path):
    modeller = modeller_of(tetrapeptide)
    modeller.add(tetrapeptide.topology, (tetrapeptide.positions + 3.0) * unit.nanometer)
    file = tmp_path / "two.pdb"
    with open(file, "w") as handle:
        app.PDBFile.writeFile(modeller.topology, modeller.positions, handle)
    with pytest.raises(ValueError, match=r"one molecule, got 52 of 104 atoms.*leave out water"):
        molecules.molecule_from_pdb(file)


def test_what_the_force_field_does_not_know_is_refused(tetrapeptide, tmp_path):
    file = tmp_path / "bare.pdb"
    modeller = modeller_of(tetrapeptide)
    modeller.delete([a for a in tetrapeptide.topology.atoms() if a.element.symbol == "H"])
    with open(file, "w") as handle:
        app.PDBFile.writeFile(modeller.topology, modeller.positions, handle)
    with pytest.raises(ValueError, match=r"force_field .* does not fit bare"):
        molecules.molecule_from_pdb(file)


@pytest.mark.parametrize(
    ("residues", "error"), [(0, ValueError), (2.0, TypeError)], ids=["zero", "float"]
)
def test_bad_lengths_are_refused(residues, error):
    with pytest.raises(error, match="residues must be a positive int"):
        molecules.capped_alanines(residues)


def test_a_peptide_has_the_same_start_in_every_process():
    """By which its simulation is found again; Python's generator goes on as if nothing had been."""
    random.seed(1)
    first = molecules.capped_alanines(2)
    expected = random.Random(1).random()
    assert random.random() == expected
    random.seed(2)
    assert (molecules.capped_alanines(2).positions == first.positions).all()
