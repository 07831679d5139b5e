"""Rank-k formulas against torch.linalg."""

import math

import pytest
import torch

from p4flows.matrices.linear_algebra import inverse_small, residual, slogdet_small

SIZE = 6
each_rank = pytest.mark.parametrize("rank", [1, 2, 3, 4])
each_batch = pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@each_batch
@each_rank
def test_small_matrices_against_torch(rank, batch):
    g = normal(*batch, rank, rank, seed=3)
    found, expected = slogdet_small(g), torch.linalg.slogdet(g)
    torch.testing.assert_close(found[0], expected.sign)
    torch.testing.assert_close(found[1], expected.logabsdet)
    torch.testing.assert_close(inverse_small(g), torch.linalg.inv(g))


@each_rank
def test_singular_small_matrices_raise_nothing(rank):
    singular = torch.ones(rank, rank, dtype=torch.float64)
    singular[-1] = 0.0
    sign, logabsdet = slogdet_small(singular)
    assert (sign.item(), logabsdet.item()) == (0.0, -math.inf)
    assert not inverse_small(singular).isfinite().all()


@each_batch
def test_residual(batch):
    a, x = normal(*batch, SIZE, SIZE), normal(*batch, SIZE, SIZE, seed=4)
    copies = a.clone(), x.clone()
    expected = torch.eye(SIZE, dtype=torch.float64) - a @ x
    torch.testing.assert_close(residual(a, x), expected)
    assert torch.equal(a, copies[0])
    assert torch.equal(x, copies[1])
