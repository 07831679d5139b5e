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
    return molecules.capped_peptide("ALA-ALA-ALA-ALA")


def write(molecule, file):
    with open(file, "w") as handle:
        app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, handle)


def modeller_of(molecule):
    return app.Modeller(molecule.topology, molecule.positions * unit.nanometer)


def test_capped_peptides_are_extended_and_left_handed(tetrapeptide):
    trajectory = tetrapeptide.trajectory(tetrapeptide.positions)
    phi, psi, omega = (
        np.degrees(compute(trajectory)[1][0])
        for compute in (mdtraj.compute_phi, mdtraj.compute_psi, mdtraj.compute_omega)
    )
    np.testing.assert_allclose(phi, [-75.0] * 4, atol=1.0)
    np.testing.assert_allclose(psi, [150.0] * 4, atol=1.0)
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
    with pytest.raises(ValueError, match=r"got 2 that no bond connects.*leave out water"):
        molecules.molecule_from_pdb(file)


def test_what_the_force_field_does_not_know_is_refused(tetrapeptide, tmp_path):
    file = tmp_path / "bare.pdb"
    modeller = modeller_of(tetrapeptide)
    modeller.delete([a for a in tetrapeptide.topology.atoms() if a.element.symbol == "H"])
    with open(file, "w") as handle:
        app.PDBFile.writeFile(modeller.topology, modeller.positions, handle)
    with pytest.raises(ValueError, match=r"does not fit bare.*There are no hydrogens: add them"):
        molecules.molecule_from_pdb(file)


@pytest.mark.parametrize("sequence", ["XYZ", "", "S", "ALA-FOO"])
def test_unknown_sequences_are_refused(sequence):
    with pytest.raises(ValueError, match="sequence must be three-letter codes"):
        molecules.capped_peptide(sequence)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: "", "must be a PDB file, got no line of an atom"),
        (lambda text: "garbled", "must be a PDB file, got no line of an atom"),
        (lambda text: text.replace("CH3 ACE", "CH3AACE"), "alternate locations"),
        (lambda text: text[:30] + "   x.000" + text[38:], "cannot be read as a PDB file"),
        (lambda text: text[:30] + "     nan" + text[38:], "cannot be read|finite coordinates"),
        (lambda text: text.split("\n", 1)[1], "does not fit mine|that connect ACE are missing"),
    ],
    ids=["empty", "garbled", "alternate", "no number", "nan", "missing atom"],
)
def test_bad_files_are_refused(tetrapeptide, tmp_path, edit, message):
    file = tmp_path / "mine.pdb"
    write(tetrapeptide, file)
    lines = [line for line in file.read_text().splitlines() if line.startswith(("ATOM", "HETATM"))]
    file.write_text(edit("\n".join(lines)))
    with pytest.raises(ValueError, match=message):
        molecules.molecule_from_pdb(file)


def test_an_unknown_residue_is_named(tetrapeptide, tmp_path):
    file = tmp_path / "mine.pdb"
    write(tetrapeptide, file)
    atoms = [line for line in file.read_text().splitlines() if line.startswith(("ATOM", "HETATM"))]
    file.write_text("\n".join(atoms).replace("NME", "XYZ"))
    with pytest.raises(ValueError, match="residue XYZ has no bonds that OpenMM knows"):
        molecules.molecule_from_pdb(file)


def test_one_force_field_file_is_one(tetrapeptide, tmp_path):
    file = tmp_path / "mine.pdb"
    write(tetrapeptide, file)
    molecule = molecules.molecule_from_pdb(file, force_field="amber14-all.xml")
    assert molecule.system.getNumParticles() == 52


@pytest.mark.parametrize("name", ["../out", "a/b", "..", ""])
def test_a_name_is_no_path(tetrapeptide, name):
    with pytest.raises(ValueError, match="name must name a file without a folder"):
        molecules.Molecule(name, tetrapeptide.system, tetrapeptide.topology, tetrapeptide.positions)


def test_a_peptide_has_the_same_start_in_every_process():
    """By which its simulation is found again; Python's generator goes on as if nothing had been."""
    random.seed(1)
    first = molecules.capped_peptide("ALA-SER")
    expected = random.Random(1).random()
    assert random.random() == expected
    random.seed(2)
    assert (molecules.capped_peptide("ALA-SER").positions == first.positions).all()
