"""Internal coordinates against mdtraj, their inverse and their volume."""

import pytest
import torch

internal = pytest.importorskip("p4flows.molecules.internal", reason="needs the extra `molecules`")
molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
mdtraj = pytest.importorskip("mdtraj", reason="needs the extra `molecules`")


@pytest.fixture(scope="module")
def z_matrix(molecule):
    return molecules.find_z_matrix(molecule.topology)


def test_agree_with_mdtraj(molecule, frames, z_matrix):
    rows = torch.tensor(z_matrix.rows)
    found = internal.internal_coordinates(frames.reshape(-1, 22, 3), rows)
    trajectory = molecule.trajectory(frames.numpy())
    for kind, compute in enumerate(
        (mdtraj.compute_distances, mdtraj.compute_angles, mdtraj.compute_dihedrals)
    ):
        expected = torch.from_numpy(compute(trajectory, rows[:, : kind + 2].numpy()))
        # mdtraj computes in float32.
        difference = torch.remainder(found[..., kind] - expected + 1.0, 2 * torch.pi) - 1.0
        assert difference.abs().max() < 1e-4
        assert found[..., kind].std() > 1e-3


def test_placement_is_the_inverse(frames, z_matrix):
    positions = frames.reshape(-1, 22, 3)
    coordinates = internal.internal_coordinates(positions, torch.tensor(z_matrix.rows))
    placement = internal.AtomPlacement(z_matrix)
    placed = placement(positions[:, list(z_matrix.block)], coordinates)
    torch.testing.assert_close(placed, positions, rtol=0, atol=1e-13)
    assert placement.stages < len(z_matrix.rows)


def test_volume_element_is_the_jacobian_of_placement():
    torch.manual_seed(0)
    bond, angle, torsion = torch.randn(3, 1, 1, 3, dtype=torch.float64)
    coordinates = torch.tensor([[[1.3, 2.0, -2.5]]], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda c: internal.place(c, bond, angle, torsion), coordinates
    ).reshape(3, 3)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(internal.volume_element(coordinates)[0], expected)


@pytest.mark.parametrize(
    "atoms",
    [
        [[0.0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3]],
        [[0.0, 0, 0], [0, 0, 0], [0, 0, 2], [0, 1, 3]],
        [[0.0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
    ],
    ids=["collinear", "coincident", "one point"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_geometry_is_finite_and_so_are_its_gradients(atoms, dtype):
    positions = torch.tensor([atoms], dtype=dtype, requires_grad=True)
    rows = torch.tensor([[0, 1, 2, 3]])
    coordinates = internal.internal_coordinates(positions, rows)
    volume = internal.volume_element(coordinates)
    assert coordinates.isfinite().all()
    assert volume.isfinite().all()
    (coordinates.sum() + volume.sum()).backward()
    assert positions.grad.isfinite().all()
