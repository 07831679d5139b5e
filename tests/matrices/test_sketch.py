"""With a merge at every step, SGD on u is an unbiased sketch of SGD on the matrix itself."""

import math

import pytest
import torch

from matrices.perturbing import additive
from p4flows import MergeHook
from p4flows.matrices import InvertibleMatrix

SIZE, COUNT, LR = 5, 20_000, 0.01
ranks = pytest.mark.parametrize("rank", [1, 2, 4, 5])


@ranks
def test_second_moment_of_v_is_the_identity(rank):
    torch.manual_seed(rank)
    v = additive(SIZE, batch_shape=(COUNT,), rank=rank).v.detach()
    products = v @ v.mT
    identity = torch.eye(SIZE)
    # The entries of v vᵀ have variance 1/k, on the diagonal 2/k.
    variance = (1 + identity) / rank
    error = (products.mean(0) - identity) / (variance / COUNT).sqrt()
    assert error.abs().max() < 4
    ratio = products.var(0) / variance
    assert (ratio - 1).abs().max() < 0.1


@ranks
def test_a_step_of_sgd_is_an_unbiased_sketch(rank):
    """COUNT copies of one matrix take one step each on a linear problem and merge."""
    torch.manual_seed(rank)
    start = torch.eye(SIZE) + 0.3 * torch.randn(SIZE, SIZE)
    matrix = additive(SIZE, batch_shape=(COUNT,), rank=rank, init=start)
    optimizer = torch.optim.SGD(matrix.parameters(), lr=LR)
    hook = MergeHook.paper(matrix, optimizer, every=1)
    x, target = torch.randn(8, SIZE), torch.randn(8, SIZE)

    weight = start.clone().requires_grad_()
    (x @ weight.mT - target).square().mean().backward()
    y = matrix.multiply(x.expand(COUNT, 8, SIZE))
    (y - target).square().mean((-2, -1)).sum().backward()
    optimizer.step()
    assert hook.stats.merged == COUNT

    steps = (matrix.frozen - start) / -LR
    gradient = weight.grad
    # A row g of the gradient makes the step g v vᵀ: mean g, variance (|g|² + g_j²)/k in column j.
    variance = (gradient.square().sum(-1, keepdim=True) + gradient.square()) / rank
    # Subtracting the float32 matrices leaves an error of about eps/LR = 1e-5, far below the other.
    error = (steps.mean(0) - gradient) / (variance / COUNT).sqrt()
    assert error.abs().max() < 4
    total = (steps - gradient).square().sum((-2, -1)).mean()
    expected = (SIZE + 1) / rank * gradient.square().sum()
    assert math.isclose(total, expected, rel_tol=0.05)


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_directions_of_the_relative_perturbation_are_orthogonal_and_second_moments_equal(rank):
    torch.manual_seed(rank)
    v = InvertibleMatrix(SIZE, batch_shape=(COUNT,), rank=rank).v.detach()
    torch.testing.assert_close(v.mT @ v, (SIZE / rank * torch.eye(rank)).expand(COUNT, rank, rank))
    error = (v @ v.mT).mean(0) - torch.eye(SIZE)
    assert error.abs().max() < 4 * math.sqrt(2 / rank / COUNT)


def test_v_is_shorter_in_many_dimensions():
    lengths = [torch.linalg.matrix_norm(InvertibleMatrix(n).v, 2).item() for n in (8, 32, 64, 256)]
    # √(n/k)·min(1, √(48/n)) with k = 8, 32, 64, 128.
    expected = [1.0, 1.0, math.sqrt(0.75), math.sqrt(2 * 3 / 16)]
    assert lengths == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_at_full_rank_the_directions_stay():
    matrix, thin = InvertibleMatrix(6), InvertibleMatrix(6, rank=3)
    for each in (matrix, thin):
        each.u.normal_(std=0.1)
        before = each.v.clone()
        assert each.merge()
        assert torch.equal(each.v, before) == (each is matrix)
