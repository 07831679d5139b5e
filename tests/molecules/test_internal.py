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
    rows, closing = torch.tensor(z_matrix.rows), torch.tensor(z_matrix.closing)
    found = internal.internal_coordinates(frames.reshape(-1, 22, 3), rows, closing)
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
    rows, closing = torch.tensor(z_matrix.rows), torch.tensor(z_matrix.closing)
    coordinates = internal.internal_coordinates(positions, rows, closing)
    placement = internal.AtomPlacement(z_matrix)
    placed = placement(positions[:, list(z_matrix.block)], coordinates)
    torch.testing.assert_close(placed, positions, rtol=0, atol=1e-13)
    assert placement.stages < len(z_matrix.rows)


@pytest.mark.parametrize("closing", [False, True], ids=["angle", "two lengths"])
def test_volume_element_is_the_jacobian_of_placement(closing):
    torch.manual_seed(0)
    references = torch.randn(3, 1, 1, 3, dtype=torch.float64)
    second = (references[0] - references[1]).norm() if closing else 2.0
    coordinates = torch.tensor([[[1.3, second, -2.5]]], dtype=torch.float64)
    flag, row = torch.tensor([closing]), torch.tensor([[3, 0, 1, 2]])
    jacobian = torch.autograd.functional.jacobian(
        lambda c: internal.place(c, flag, *references), coordinates
    ).reshape(3, 3)
    placed = internal.place(coordinates, flag, *references)
    positions = torch.cat([*references, placed], 1)
    found = internal.volume_element(positions, coordinates, row, flag)
    torch.testing.assert_close(found[0], torch.linalg.slogdet(jacobian).logabsdet)
    again = internal.internal_coordinates(positions, row, flag)
    torch.testing.assert_close(again, coordinates)


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
@pytest.mark.parametrize("closing", [False, True], ids=["angle", "two lengths"])
def test_bad_geometry_is_finite_and_so_are_its_gradients(atoms, dtype, closing):
    positions = torch.tensor([atoms], dtype=dtype, requires_grad=True)
    row = torch.tensor([[0, 1, 2, 3]]), torch.tensor([closing])
    coordinates = internal.internal_coordinates(positions, *row)
    volume = internal.volume_element(positions, coordinates, *row)
    assert coordinates.isfinite().all()
    assert volume.isfinite().all()
    (coordinates.sum() + volume.sum()).backward()
    assert positions.grad.isfinite().all()
