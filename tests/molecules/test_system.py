"""Alanine dipeptide in its solvents and with its constraints."""

import subprocess
import sys

import pytest

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")


@pytest.mark.parametrize(
    ("solvent", "force"),
    [("obc2", "GBSAOBCForce"), ("obc1", "CustomGBForce"), ("vacuum", None)],
)
def test_solvents_are_the_forces_that_they_promise(solvent, force):
    molecule = molecules.alanine_dipeptide(solvent)
    forces = {type(f).__name__ for f in molecule.system.getForces()}
    assert forces & {"GBSAOBCForce", "CustomGBForce"} == ({force} if force else set())
    assert "HarmonicBondForce" in forces


@pytest.mark.parametrize(
    ("constraints", "count"), [(None, 0), ("hydrogen_bonds", 12), ("all_bonds", 21)]
)
def test_constraints(constraints, count):
    molecule = molecules.alanine_dipeptide(constraints=constraints)
    assert molecule.system.getNumConstraints() == count
    assert (constraints or "") in molecule.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solvent": "water"}, r"solvent must be one of \['obc2', 'obc1', 'vacuum'\], got 'water'"),
        ({"constraints": "none"}, "constraints must be one of .* got 'none'"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        molecules.alanine_dipeptide(**arguments)


def test_trajectories_take_flat_and_shaped_positions(molecule):
    flat = molecule.positions.reshape(1, 66)
    trajectory = molecule.trajectory(flat)
    assert trajectory.n_atoms == 22
    assert trajectory.topology.n_bonds == 21
    assert (molecule.trajectory(molecule.positions).xyz == trajectory.xyz).all()


def test_the_core_does_not_import_the_extra():
    code = "import sys, p4flows; print({'openmm', 'openmmtools', 'mdtraj'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
