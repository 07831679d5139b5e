"""Hydrogens that change places: permutations, augmented data, densities averaged over them."""

import math

import pytest
import torch
from nflows.flows.base import Flow
from nflows.transforms.base import CompositeTransform
from nflows.transforms.standard import PointwiseAffineTransform

from p4flows import spline_flow
from p4flows.flows.base import BaseNormal

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
from openmm import app  # noqa: E402

from p4flows.molecules.symmetry import check_symmetries  # noqa: E402

EXCHANGE = torch.tensor([[0, 1], [1, 0]])
# Two atoms of one kind in a harmonic well; a flow that has them at different places and widths.
SHIFT = torch.tensor([0.4, 0.0, 0.0, -0.4, 0.0, 0.0], dtype=torch.float64)
WIDTH = torch.tensor([1.2, 1.1, 1.2, 0.9, 1.3, 1.1], dtype=torch.float64)


@pytest.fixture
def generator():
    affine = PointwiseAffineTransform(scale=1.0 / WIDTH, shift=-SHIFT / WIDTH)
    coordinates = PointwiseAffineTransform(scale=torch.full((6,), 2.0, dtype=torch.float64))
    wider = PointwiseAffineTransform(scale=torch.full((6,), 0.5, dtype=torch.float64))
    flow = Flow(CompositeTransform([wider, affine]), BaseNormal(6)).double()
    return flow, coordinates, lambda x: 0.5 * x.square().sum(-1)


@pytest.mark.parametrize(("residues", "groups"), [(1, 3), (2, 4)])
def test_methyl_rotations_leave_the_energy_alone(residues, groups):
    molecule = molecules.capped_alanines(residues)
    found = molecules.methyl_rotations(molecule.topology)
    assert found.shape == (3**groups, molecule.atoms)
    assert found[0].tolist() == list(range(molecule.atoms))
    assert len(set(map(tuple, found.tolist()))) == 3**groups
    heavy = [a.index for a in molecule.topology.atoms() if a.element is not app.element.hydrogen]
    assert (found[:, heavy] == torch.tensor(heavy)).all()
    torch.manual_seed(0)
    frame = torch.from_numpy(molecule.positions) + 0.002 * torch.randn(molecule.atoms, 3)
    energies = molecules.OpenMMEnergy(molecule.system, 600.0)(frame[found].flatten(1))
    torch.testing.assert_close(energies, energies[:1].expand_as(energies), rtol=1e-5, atol=1e-4)


def test_the_turns_of_the_last_groups_come_first():
    """And are groups, which can be averaged over where all turns would take too long."""
    found = molecules.methyl_rotations(molecules.capped_alanines(2).topology)
    for count in range(5):
        check_symmetries(found[: 3**count], found.shape[1])
        assert ((found[: 3**count] != found[0]).any(0).sum()) == 3 * count


def test_methyl_rotations_keep_the_hand():
    """The volume that the hydrogens of a group span with its carbon keeps its sign."""
    molecule = molecules.alanine_dipeptide()
    bonds = [{first.index, second.index} for first, second in molecule.topology.bonds()]
    rows = molecules.find_z_matrix(molecule.topology).rows
    hydrogens = [a.index for a in molecule.topology.atoms() if a.element is app.element.hydrogen]
    carbons = {row[1] for row in rows if sum({row[1], h} in bonds for h in hydrogens) == 3}
    assert len(carbons) == 3
    positions = torch.from_numpy(molecule.positions)
    for carbon in carbons:
        own = [h for h in hydrogens if {carbon, h} in bonds]
        arms = positions[molecules.methyl_rotations(molecule.topology)][:, own] - positions[carbon]
        volumes = torch.linalg.det(arms)
        assert (volumes.sign() == volumes[0].sign()).all()


def test_a_molecule_without_methyl_has_the_identity_alone():
    topology = app.Topology()
    residue = topology.addResidue("HOH", topology.addChain())
    oxygen = topology.addAtom("O", app.element.oxygen, residue)
    for name in ("H1", "H2"):
        topology.addBond(oxygen, topology.addAtom(name, app.element.hydrogen, residue))
    assert molecules.methyl_rotations(topology).tolist() == [[0, 1, 2]]
    with pytest.raises(TypeError, match="topology must be"):
        molecules.methyl_rotations("water")


def test_permuted_draws_every_order_and_no_other():
    turns = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 1]])
    positions = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)).expand(300, 9)
    generator = torch.Generator().manual_seed(1)
    found = molecules.permuted(positions, turns, generator=generator)
    expected = positions[0].reshape(3, 3)[turns].flatten(1)
    which = (found.unsqueeze(1) == expected).all(-1)
    assert (which.sum(-1) == 1).all()
    assert (which.sum(0) > 70).all()


def test_the_mean_density_is_that_of_samples_with_their_atoms_exchanged(generator):
    """Weights p/q̄ average to Z under it, also of what tells the atoms apart."""
    flow, coordinates, energy = generator
    torch.manual_seed(0)
    found = molecules.weighted_samples(*generator, 40_000, symmetries=EXCHANGE)
    z = math.exp(torch.logsumexp(found.log_weights, 0) - math.log(40_000))
    assert z == pytest.approx((2.0 * math.pi) ** 3, rel=0.02)
    weights = torch.softmax(found.log_weights, 0)
    torch.testing.assert_close(
        weights @ found.positions, torch.zeros(6, dtype=torch.float64), rtol=0, atol=0.05
    )
    again = molecules.log_density_of(flow, coordinates, found.positions, EXCHANGE)
    torch.testing.assert_close(-energy(found.positions) - again, found.log_weights)
    torch.testing.assert_close(coordinates(found.positions)[0], found.features)
    torch.testing.assert_close(
        molecules.log_weights_of(*generator, found.positions, symmetries=EXCHANGE),
        found.log_weights,
    )


def test_the_mean_density_is_no_worse(generator):
    torch.manual_seed(0)
    plain = molecules.weighted_samples(*generator, 40_000)
    mean = molecules.weighted_samples(*generator, 40_000, symmetries=EXCHANGE)
    assert molecules.effective_sample_size(mean.log_weights) > 1.05 * (
        molecules.effective_sample_size(plain.log_weights)
    )
    frames = torch.randn(40_000, 6, dtype=torch.float64)
    gain = molecules.log_density_of(*generator[:2], frames, EXCHANGE) - molecules.log_density_of(
        *generator[:2], frames
    )
    assert gain.mean() > 0.05


def test_without_symmetries_the_density_is_the_flows(generator):
    flow, coordinates, _ = generator
    positions = torch.randn(7, 6, dtype=torch.float64)
    features, logabsdet = coordinates(positions)
    torch.testing.assert_close(
        molecules.log_density_of(flow, coordinates, positions), flow.log_prob(features) + logabsdet
    )


@pytest.mark.parametrize(
    ("symmetries", "error", "message"),
    [
        ([[0, 1]], TypeError, "int64"),
        (torch.tensor([[0.0, 1.0]]), TypeError, "int64"),
        (torch.tensor([[0, 1, 2]]), ValueError, r"shape \(g, 2\)"),
        (torch.zeros(0, 2, dtype=torch.int64), ValueError, "g > 0"),
        (torch.tensor([[0, 0]]), ValueError, "permutation of 0 to 1"),
        (torch.tensor([[1, 0]]), ValueError, "a group"),
    ],
)
def test_what_is_no_group_is_refused(generator, symmetries, error, message):
    flow, coordinates, _ = generator
    positions = torch.randn(7, 6, dtype=torch.float64)
    with pytest.raises(error, match=message):
        molecules.log_density_of(flow, coordinates, positions, symmetries)
    with pytest.raises(error, match=message):
        molecules.weighted_samples(*generator, 3, symmetries=symmetries)


def test_two_turns_without_the_third_are_no_group(generator):
    flow, coordinates, _ = generator
    turns = torch.tensor([[0, 1, 2], [1, 2, 0]])
    with pytest.raises(ValueError, match="a group"):
        molecules.log_density_of(flow, coordinates, torch.randn(2, 9), turns)


def test_orders_that_the_coordinates_do_not_cover_have_no_density(molecule, frames):
    """A third of a turn is another order; an exchange of two hydrogens would mirror the group."""
    coordinates = molecules.MixedCoordinateTransform(frames, molecule.topology, circular=True)
    torch.manual_seed(0)
    flow = spline_flow(coordinates.features, 1, circular=coordinates.circular, hidden=(8,)).double()
    turns = molecules.methyl_rotations(molecule.topology)
    own = molecules.log_density_of(flow, coordinates, frames)
    mirror = torch.arange(molecule.atoms).repeat(2, 1)
    mirror[1, [0, 2]] = torch.tensor([2, 0])
    exchanged = molecules.log_density_of(flow, coordinates, frames, mirror)
    torch.testing.assert_close(exchanged, own - math.log(2.0))
    mean = molecules.log_density_of(flow, coordinates, frames, turns)
    assert (mean >= own - math.log(len(turns))).all()
    again = molecules.permuted(frames, turns)
    assert not torch.equal(again, frames)
    torch.testing.assert_close(molecules.log_density_of(flow, coordinates, again, turns), mean)
