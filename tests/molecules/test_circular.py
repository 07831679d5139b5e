"""Circular torsions, labels of hydrogens and hands of chiral centres."""

import math

import pytest
import torch

from molecules.turning import logabsdet_with_rigid_motion, rotation

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")


@pytest.fixture(scope="module")
def turning(molecule):
    """Positions whose first methyl group (atoms 0, 2, 3 on 1) turns all around, shape (600, 66)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(600, 22, 3, dtype=torch.float64, generator=generator)
    frames = torch.from_numpy(molecule.positions) + 0.003 * noise
    axis = frames[:, 4] - frames[:, 1]
    axis = axis / axis.norm(dim=-1, keepdim=True)
    angle = 2.0 * math.pi * torch.rand(600, 1, dtype=torch.float64, generator=generator)
    hydrogens = [0, 2, 3]
    arms = frames[:, hydrogens] - frames[:, 1:2]
    frames[:, hydrogens] = frames[:, 1:2] + arms @ rotation(angle * axis).mT
    return frames.flatten(1)


@pytest.fixture(scope="module")
def transform(turning, molecule):
    return molecules.MixedCoordinateTransform(turning, molecule.topology, circular=True)


def test_only_what_turns_freely_is_circular(transform, turning, molecule):
    first = transform.features - len(transform.rows)
    (column,) = transform.circular
    atom, bond, angle, _ = transform.z_matrix.rows[column - first]
    assert atom in (0, 2, 3) and (bond, angle) == (1, 4)
    plain = molecules.MixedCoordinateTransform(turning, molecule.topology)
    assert plain.circular == ()
    features, expected = transform(turning)[0], plain(turning)[0]
    others = [c for c in range(60) if c != column]
    torch.testing.assert_close(features[:, others], expected[:, others])
    angles = features[:, column]
    assert angles.min() < -3.0 and angles.max() > 3.0
    assert (angles >= -math.pi).all() and (angles < math.pi).all()


def test_circular_features_are_radians_of_the_torsion(transform, turning):
    (column,) = transform.circular
    row = column - (transform.features - len(transform.rows))
    features, _ = transform(turning[:1])
    turned = features.clone()
    turned[:, column] += 0.3
    torsions = [
        molecules.mixed.internal_coordinates(
            transform.inverse(f)[0].reshape(1, 22, 3), transform.rows, transform.closing
        )[0, row, 2]
        for f in (features, turned)
    ]
    assert torch.remainder(torsions[1] - torsions[0], 2.0 * math.pi).item() == pytest.approx(0.3)


def test_a_turn_of_two_pi_is_the_same_structure(transform, turning):
    features, _ = transform(turning[:5])
    once_more = features.clone()
    once_more[:, transform.circular[0]] -= 2.0 * math.pi
    torch.testing.assert_close(transform.inverse(once_more), transform.inverse(features))
    assert transform.covers(features).all() and not transform.covers(once_more).any()


def test_logabsdet_is_that_of_features_and_rigid_motion(transform, turning):
    features, logabsdet = transform(turning[:2])
    torch.testing.assert_close(logabsdet_with_rigid_motion(transform, features), logabsdet)


def test_data_is_covered_and_round_trips(transform, turning):
    features, logabsdet = transform(turning)
    assert transform.covers(features).all()
    positions, inverse_logabsdet = transform.inverse(features)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet)
    torch.testing.assert_close(transform(positions)[0], features)


@pytest.mark.parametrize("hydrogens", [(2, 3), (11, 12), (19, 20)])
def test_exchanged_hydrogens_are_not_covered(transform, turning, hydrogens):
    exchanged = turning[:20].reshape(-1, 22, 3).clone()
    exchanged[:, list(hydrogens)] = exchanged[:, list(reversed(hydrogens))]
    assert not transform.covers(transform(exchanged.flatten(1))[0]).any()


@pytest.mark.parametrize("block", [None, [4, 6, 8, 14, 16]])
def test_mirror_images_are_not_covered(turning, molecule, block):
    transform = molecules.MixedCoordinateTransform(turning, molecule.topology, block=block)
    mirrored = turning[:20].reshape(-1, 22, 3) * torch.tensor([1.0, 1.0, -1.0])
    features, _ = transform(mirrored.flatten(1).double())
    assert not transform.covers(features).any()


def test_negative_lengths_and_angles_are_not_covered(transform, turning):
    features, _ = transform(turning[:1])
    rows = len(transform.rows)
    first = transform.features - 3 * rows
    for column in (first, first + rows, first + 2 * rows + 1):
        for sign in (-1.0, 1.0):
            broken = features.clone()
            broken[:, column] += sign * 1e3
            # A length has no upper end.
            assert bool(transform.covers(broken)) == (column == first and sign > 0)


def test_it_tells_what_it_did(transform):
    text = repr(transform)
    assert f"circular={transform.circular}" in text
    atoms = {row[0] for row in transform.one_sided()}
    # Two hydrogens of each methyl group; the third one carries the torsion of the group.
    for group in ((0, 2, 3), (11, 12, 13), (19, 20, 21)):
        assert len(atoms & set(group)) == 2
    assert all(str(atom) in text.split("one-sided")[1] for atom in atoms)


def test_circular_columns_are_carried_by_the_state(transform, turning, molecule):
    other = molecules.MixedCoordinateTransform(turning[:300] + 1e-4, molecule.topology)
    other.load_state_dict(transform.state_dict())
    assert other.circular == transform.circular
    torch.testing.assert_close(other(turning[:5]), transform(turning[:5]))


def test_circular_must_be_a_bool(turning, molecule):
    with pytest.raises(TypeError, match="circular must be a bool, got list"):
        molecules.MixedCoordinateTransform(turning, molecule.topology, circular=[45])


def test_float32_is_kept(turning, molecule):
    narrow = molecules.MixedCoordinateTransform(turning.float(), molecule.topology, circular=True)
    features, logabsdet = narrow(turning.float())
    assert features.dtype == logabsdet.dtype == torch.float32
    assert narrow.covers(features).all()
