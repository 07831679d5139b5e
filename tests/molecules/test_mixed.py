"""MixedCoordinateTransform: contract of a transform that drops rigid motions."""

import copy
import math

import pytest
import torch

from molecules.turning import logabsdet_with_rigid_motion, move

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
system = pytest.importorskip("p4flows.molecules.system", reason="needs the extra `molecules`")
app = pytest.importorskip("openmm.app", reason="needs the extra `molecules`")
mdtraj = pytest.importorskip("mdtraj", reason="needs the extra `molecules`")

BLOCKS = {"around Cα": None, "backbone": [4, 6, 8, 14, 16], "three": [6, 8, 14]}


@pytest.fixture(scope="module", params=BLOCKS.values(), ids=BLOCKS)
def transform(request, frames, molecule):
    return molecules.MixedCoordinateTransform(frames, molecule.topology, block=request.param)


def distances(positions):
    atoms = positions.reshape(len(positions), -1, 3)
    return torch.cdist(atoms, atoms)


def test_features_are_standardised(transform, frames):
    features, _ = transform(frames)
    assert features.shape == (400, 60) == (400, transform.features)
    assert features.mean(0).abs().max() < 1e-9
    torch.testing.assert_close(features.std(0), torch.ones(60, dtype=torch.float64))


def test_inverse_reconstructs_all_but_the_rigid_motion(transform, frames):
    features, logabsdet = transform(frames)
    positions, logabsdet_inverse = transform.inverse(features)
    torch.testing.assert_close(distances(positions), distances(frames))
    torch.testing.assert_close(logabsdet_inverse, -logabsdet)
    again, _ = transform(positions)
    torch.testing.assert_close(again, features)


def test_rigid_motions_change_nothing(transform, frames):
    features, logabsdet = transform(frames)
    moved_features, moved_logabsdet = transform(move(frames))
    torch.testing.assert_close(moved_features, features)
    torch.testing.assert_close(moved_logabsdet, logabsdet)


def test_logabsdet_is_that_of_features_and_rigid_motion(transform, frames):
    features, logabsdet = transform(frames[::100])
    torch.testing.assert_close(logabsdet_with_rigid_motion(transform, features), logabsdet)
    assert logabsdet.std() > 1e-2


def test_gradients_of_both_directions(transform, frames):
    x = frames[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(transform, x, fast_mode=True)
    q = transform(frames[:1])[0].requires_grad_()
    assert torch.autograd.gradcheck(transform.inverse, q, fast_mode=True)


def test_float32_keeps_its_digits(frames, molecule, transform):
    block = transform.z_matrix.block
    narrow = molecules.MixedCoordinateTransform(frames.float(), molecule.topology, block=block)
    features, logabsdet = narrow(frames.float())
    assert features.dtype == logabsdet.dtype == torch.float32
    positions, _ = narrow.inverse(features)
    assert positions.dtype == torch.float32
    # In nm, where a bond is 0.1.
    assert (distances(positions.double()) - distances(frames)).abs().max() < 2e-6


def test_columns_are_block_lengths_angles_torsions(transform, frames, molecule):
    features, _ = transform(frames)
    atom, bond, *_ = transform.z_matrix.rows[0]
    apart = distances(frames)[:, atom, bond]
    column = 3 * len(transform.z_matrix.block) - 6
    standard = (apart - apart.mean()) / apart.std()
    torch.testing.assert_close(features[:, column], standard)
    torsion = mdtraj.compute_dihedrals(
        molecule.trajectory(frames.numpy()), [transform.z_matrix.rows[0]]
    )[:, 0]
    rows = len(transform.z_matrix.rows)
    found = features[:, column + 2 * rows] * transform.deviation[0, 2] + transform.mean[0, 2]
    difference = torch.remainder(found - torch.from_numpy(torsion) + 1.0, 2 * math.pi) - 1.0
    assert difference.abs().max() < 1e-4


def test_torsions_are_cut_in_the_gap_of_the_data(frames, molecule):
    transform = molecules.MixedCoordinateTransform(frames, molecule.topology)
    torsions = transform.mean[:, 2] + transform.deviation[:, 2] * transform(frames)[0][:, -17:]
    assert (torsions >= transform.cuts).all()
    assert (torsions < transform.cuts + 2.0 * math.pi).all()
    # The peptide bond is trans: data near ±180°, so that the cut is near 0°.
    omega = [row[:3] for row in transform.z_matrix.rows].index((1, 4, 6))
    assert transform.cuts[omega].abs() < 0.5
    assert transform.deviation[omega, 2] < 0.5


def test_any_features_give_finite_structures(transform):
    features = 100.0 * torch.randn(50, 60, dtype=torch.float64)
    positions, logabsdet = transform.inverse(features)
    assert positions.isfinite().all()
    assert logabsdet.isfinite().all()


def test_bad_geometry_gives_finite_features(transform, frames):
    broken = frames[:3].clone().reshape(3, 22, 3)
    broken[0] = 0.0
    broken[1, :, :2] = 0.0
    broken[2, 0] = broken[2, 1]
    features, logabsdet = transform(broken.flatten(1))
    assert features.isfinite().all()
    assert logabsdet.isfinite().all()


def test_copies_and_state_dicts_carry_everything(transform, frames, molecule):
    expected = transform(frames)
    twin = copy.deepcopy(transform)
    other = molecules.MixedCoordinateTransform(
        move(frames[:200]) + 1e-3 * torch.randn(200, 66),
        molecule.topology,
        block=transform.z_matrix.block,
    )
    assert not torch.allclose(other(frames)[0], expected[0])
    other.load_state_dict(transform.state_dict())
    for found in (twin, other):
        torch.testing.assert_close(found(frames), expected)


def ring(name, atoms):
    """Topology and noisy frames of one of openmmtools' molecules."""
    stem = str(system._openmmtools_data() / name)
    topology = app.AmberPrmtopFile(f"{stem}.prmtop").topology
    positions = app.AmberInpcrdFile(f"{stem}.inpcrd").getPositions(asNumpy=True)._value
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 3 * atoms, dtype=torch.float64, generator=generator)
    return topology, torch.from_numpy(positions.ravel()) + 0.003 * noise


def test_all_bonds_of_a_ring_are_coordinates():
    topology, frames = ring("benzene-toluene-implicit/receptor", 12)
    transform = molecules.MixedCoordinateTransform(frames, topology, circular=True)
    features, _ = transform(frames)
    assert features.shape == (50, 30) and transform.covers(features).all()
    torch.testing.assert_close(distances(transform.inverse(features)[0]), distances(frames))
    (closing,) = (row for row, last in zip(*transform.z_matrix[1:], strict=True) if last)
    row = transform.z_matrix.rows.index(closing)
    lengths = distances(frames)[:, closing[0], list(closing[1:3])]
    columns = [30 - 3 * 8 + row, 30 - 2 * 8 + row]
    standard = (lengths - lengths.mean(0)) / lengths.std(0)
    torch.testing.assert_close(features[:, columns], standard)
    # Lengths that make no triangle.
    apart = features[:1].clone()
    apart[:, columns] = -60.0
    assert not transform.covers(apart).any()


def test_a_cage_is_refused():
    topology, frames = ring("cb7-b2/receptor", 126)
    with pytest.raises(ValueError, match="closes two rings at once"):
        molecules.MixedCoordinateTransform(frames, topology)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[:, :63], ValueError, r"shape \(N, 66\), got \(400, 63\)"),
        (lambda x: x.long(), TypeError, "floating-point tensor"),
        (lambda x: x * math.nan, ValueError, "data must be finite"),
        (lambda x: x[:1].repeat(100, 1), ValueError, "must vary in 9 directions"),
    ],
)
def test_data_that_does_not_suit_is_refused(frames, molecule, change, error, message):
    with pytest.raises(error, match=message):
        molecules.MixedCoordinateTransform(change(frames), molecule.topology)


def test_collinear_references_in_the_data_are_refused(frames, molecule):
    bent = frames.clone().reshape(-1, 22, 3)
    bent[7, 4] = 2.0 * bent[7, 6] - bent[7, 8]
    with pytest.raises(ValueError, match="must not be collinear or coincide, as in frame 7"):
        molecules.MixedCoordinateTransform(bent.flatten(1), molecule.topology)


def test_constrained_bonds_are_refused(frames, molecule):
    fixed = frames.clone().reshape(-1, 22, 3)
    arm = fixed[:, 0] - fixed[:, 1]
    fixed[:, 0] = fixed[:, 1] + 0.109 * arm / arm.norm(dim=-1, keepdim=True)
    with pytest.raises(ValueError, match="constant bond length of atom 0"):
        molecules.MixedCoordinateTransform(fixed.flatten(1), molecule.topology)


def test_wrong_shapes_are_refused(transform):
    with pytest.raises(ValueError, match=r"shape \(N, 66\)"):
        transform(torch.zeros(2, 60, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"shape \(N, 60\)"):
        transform.inverse(torch.zeros(2, 66, dtype=torch.float64))
