"""Whitened Cartesian blocks."""

import pytest
import torch

from molecules.turning import move, rotation

whitening = pytest.importorskip("p4flows.molecules.whitening", reason="needs the extra `molecules`")


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    shape = torch.randn(1, 5, 3, dtype=torch.float64, generator=generator)
    noise = torch.randn(300, 5, 3, dtype=torch.float64, generator=generator)
    return move((shape + 0.1 * noise).flatten(1), generator).reshape(-1, 5, 3)


def test_whitened_coordinates_are_white(data):
    whitened, _ = whitening.WhitenedBlock(data)(data)
    assert whitened.shape == (300, 9)
    torch.testing.assert_close(torch.cov(whitened.T), torch.eye(9, dtype=torch.float64))
    assert whitened.mean(0).abs().max() < 1e-12


def test_nothing_but_the_rigid_motion_is_lost(data):
    block = whitening.WhitenedBlock(data)
    whitened, logabsdet = block(data)
    positions, logabsdet_inverse = block.inverse(whitened)
    torch.testing.assert_close(torch.cdist(positions, positions), torch.cdist(data, data))
    torch.testing.assert_close(logabsdet, -logabsdet_inverse)
    moved, logabsdet_moved = block(move(data.flatten(1)).reshape(-1, 5, 3))
    torch.testing.assert_close(moved, whitened)
    torch.testing.assert_close(logabsdet_moved, logabsdet)


def test_mirror_images_are_told_apart(data):
    block = whitening.WhitenedBlock(data)
    mirrored = data * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    whitened, logabsdet = block(mirrored)
    assert (whitened - block(data)[0]).abs().min(1).values.max() > 1.0
    positions, _ = block.inverse(whitened)
    torch.testing.assert_close(torch.cdist(positions, positions), torch.cdist(data, data))
    assert logabsdet.isfinite().all()


def test_logabsdet_is_that_of_coordinates_and_rigid_motion(data):
    block = whitening.WhitenedBlock(data)
    whitened, logabsdet = block(data[:1])

    def full(variables):
        shape, translation, turn = variables.split([9, 3, 3])
        positions = block.inverse(shape.unsqueeze(0))[0][0]
        return (positions @ rotation(turn).mT + translation).flatten()

    start = torch.cat([whitened[0], torch.zeros(6, dtype=torch.float64)])
    jacobian = torch.autograd.functional.jacobian(full, start)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, -logabsdet[0])


def test_gradients_are_those_of_the_superposition(data):
    block = whitening.WhitenedBlock(data)
    assert torch.autograd.gradcheck(block, data[:2].clone().requires_grad_())


def test_gradients_are_finite_where_singular_values_meet():
    tetrahedron = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double()
    torch.manual_seed(0)
    data = tetrahedron + 1e-3 * torch.randn(100, 4, 3, dtype=torch.float64)
    block = whitening.WhitenedBlock(data)
    block.reference.copy_(tetrahedron)
    assert torch.autograd.gradcheck(block, tetrahedron.unsqueeze(0).requires_grad_())


@pytest.mark.parametrize(
    ("frames", "directions", "message"),
    [
        (50, 1, "must not be collinear"),
        (4, 3, "must vary in 9 directions, got 3"),
        (1, 3, "must vary in 9 directions, got 0"),
    ],
    ids=["collinear", "few", "constant"],
)
def test_data_that_cannot_be_whitened_is_refused(frames, directions, message):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(frames, 5, directions, dtype=torch.float64, generator=generator)
    with pytest.raises(ValueError, match=message):
        whitening.WhitenedBlock(data.expand(frames, 5, 3).repeat(50 // frames, 1, 1))
