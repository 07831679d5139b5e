"""Every capped amino acid: coordinates, hands, and groups that turn into themselves."""

import functools
import math

import numpy as np
import pytest
import torch

from molecules import openmm_frames
from molecules.turning import logabsdet_with_rigid_motion

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")

# Orders of the groups of the side chain; the caps have two of three more.
SIDE_CHAINS = {
    "ALA": [3], "ARG": [2, 2, 2], "ASN": [2], "ASP": [2], "CYS": [], "GLN": [2], "GLU": [2],
    "GLY": [], "HID": [], "HIE": [], "HIP": [], "ILE": [3, 3], "LEU": [3, 3], "LYS": [3],
    "MET": [3], "PHE": [2], "PRO": [], "SER": [], "THR": [3], "TRP": [], "TYR": [2],
    "VAL": [3, 3], "CYS-PRO-PHE": [2],
}  # fmt: skip


@functools.cache
def simulated(sequence):
    molecule = molecules.capped_peptide(sequence)
    return molecule, openmm_frames.frames(molecule, 3 * molecule.atoms + 60, spacing=20)


def hands(molecule, frames):
    """Signs of the volumes at Cα, and at Cβ of isoleucine and threonine."""
    corners = {"CA": ("N", "C", "CB"), "ILE": ("CA", "CG1", "CG2"), "THR": ("CA", "OG1", "CG2")}
    found = []
    positions = frames.reshape(len(frames), -1, 3)
    for residue in molecule.topology.residues():
        atom = {a.name: a.index for a in residue.atoms()}
        for centre, names in (("CA", corners["CA"]), ("CB", corners.get(residue.name))):
            if names is not None and {centre, *names} <= atom.keys():
                arms = positions[:, [atom[n] for n in names]] - positions[:, [atom[centre]]]
                found.append(torch.linalg.det(arms).sign())
    return torch.stack(found, 1) if found else torch.zeros(len(frames), 0)


@pytest.mark.parametrize("sequence", SIDE_CHAINS)
def test_coordinates_of_a_peptide(sequence):
    molecule, frames = simulated(sequence)
    rotors = molecules.find_rotors(molecule.topology, molecule.positions)
    assert sorted(r.order for r in rotors) == sorted([3, 3, *SIDE_CHAINS[sequence]])
    transform = molecules.MixedCoordinateTransform(
        frames, molecule.topology, rotors=rotors, circular=True
    )
    assert len(transform.rotors) == len(rotors)
    folded = transform.fold(frames)
    features, logabsdet = transform(folded)
    assert features.shape[1] == 3 * molecule.atoms - 6 and transform.covers(features).all()
    positions, inverse = transform.inverse(features)
    torch.testing.assert_close(inverse, -logabsdet)
    torch.testing.assert_close(transform(positions)[0], features)
    apart = [torch.pdist(p.reshape(-1, 3)) for p in (positions[0], folded[0])]
    torch.testing.assert_close(*apart, rtol=0, atol=1e-6)
    full = logabsdet_with_rigid_motion(transform, features[:1])
    torch.testing.assert_close(full, logabsdet[:1])


@pytest.mark.parametrize("sequence", SIDE_CHAINS)
def test_amino_acids_are_left_handed_and_stay_so(sequence):
    molecule, frames = simulated(sequence)
    start = hands(molecule, torch.from_numpy(molecule.positions)[None])
    assert (start > 0).all() and (hands(molecule, frames) > 0).all()
    transform = molecules.MixedCoordinateTransform(frames, molecule.topology, circular=True)
    features, _ = transform(frames)
    noisy = features + 0.5 * torch.randn_like(features)
    drawn = transform.inverse(noisy)[0][transform.covers(noisy)]
    assert len(drawn) and (hands(molecule, drawn) > 0).all()
    mirrored = (frames.reshape(len(frames), -1, 3) * torch.tensor([1.0, 1.0, -1.0])).flatten(1)
    if hands(molecule, frames).shape[1]:
        assert not transform.covers(transform(mirrored.double())[0]).any()


@pytest.mark.parametrize("sequence", ["VAL", "LYS", "PHE", "ASP", "ARG"])
def test_folding_exchanges_equivalent_atoms(sequence):
    molecule, frames = simulated(sequence)
    frames = frames[:40]
    rotors = molecules.find_rotors(molecule.topology, molecule.positions)
    transform = molecules.MixedCoordinateTransform(
        frames, molecule.topology, rotors=rotors, circular=True
    )
    folded = transform.fold(frames)
    assert not torch.equal(folded, frames)
    torch.testing.assert_close(transform.fold(folded), folded)
    torch.testing.assert_close(transform.fold(transform.unfold(frames)), folded)
    energy = molecules.OpenMMEnergy(molecule.system, 600.0)
    change = (energy(folded) - energy(frames)).abs()
    # Amber's improper torsions depend on the order of the atoms of flat groups.
    flat = any(rotor.order == 2 for rotor in rotors)
    assert change.max() < (2.0 if flat else 1e-3)
    for rotor in rotors:
        order = list(rotor.permutation)
        turned = list(range(molecule.atoms))
        for _ in range(rotor.order):
            turned = [turned[i] for i in order]
        assert turned == list(range(molecule.atoms))


def test_folding_leaves_averages_alone():
    """A turned sample has weights of its own: those of three wells are those of one."""
    molecule, frames = simulated("ALA")
    rotors = molecules.find_rotors(molecule.topology, molecule.positions)
    whole = molecules.MixedCoordinateTransform(frames, molecule.topology, circular=True)
    third = molecules.MixedCoordinateTransform(
        frames, molecule.topology, rotors=rotors, circular=True
    )
    folded = third.fold(frames[:5])
    # Each feature of a group's torsion spans three times the angle.
    difference = third(folded)[1] - whole(folded)[1]
    spread = difference - difference[0]
    assert spread.abs().max() < 1e-6
    assert (third.order > 1).sum() == 3
    assert third.order.log().sum().item() == pytest.approx(3 * math.log(3.0))


def test_what_shares_more_than_a_bond_is_refused():
    app = pytest.importorskip("openmm.app", reason="needs the extra `molecules`")
    topology = app.Topology()
    residue = topology.addResidue("CUB", topology.addChain())
    atoms = [topology.addAtom(f"C{i}", app.element.carbon, residue) for i in range(8)]
    for first in range(8):
        for bit in (1, 2, 4):
            if first < first ^ bit:
                topology.addBond(atoms[first], atoms[first ^ bit])
    with pytest.raises(ValueError, match="closes two rings at once"):
        molecules.find_z_matrix(topology)


def test_a_disulphide_bridge_is_a_ring_as_others():
    app = pytest.importorskip("openmm.app", reason="needs the extra `molecules`")
    unit = pytest.importorskip("openmm.unit", reason="needs the extra `molecules`")
    open_chain = molecules.capped_peptide("CYS-GLY-GLY-CYS")
    modeller = app.Modeller(open_chain.topology, open_chain.positions * unit.nanometer)
    modeller.delete([a for a in modeller.topology.atoms() if a.name == "HG"])
    sulphurs = [a for a in modeller.topology.atoms() if a.name == "SG"]
    modeller.topology.addBond(*sulphurs)
    system = app.ForceField("amber99sbildn.xml", "amber99_obc.xml").createSystem(modeller.topology)
    start = modeller.positions.value_in_unit(unit.nanometer)
    molecule = molecules.Molecule("bridge", system, modeller.topology, np.array(start))
    frames = openmm_frames.frames(molecule, 200, spacing=20)
    transform = molecules.MixedCoordinateTransform(frames, molecule.topology, circular=True)
    assert sum(transform.z_matrix.closing) == 1
    features, logabsdet = transform(frames)
    positions, inverse = transform.inverse(features)
    assert transform.covers(features).all()
    torch.testing.assert_close(inverse, -logabsdet)
    apart = [torch.pdist(p.reshape(-1, 3)) for p in (positions[7], frames[7])]
    torch.testing.assert_close(*apart, rtol=0, atol=1e-6)
