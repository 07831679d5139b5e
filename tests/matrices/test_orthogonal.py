"""OrthogonalMatrix against the Cayley map of dense matrices, its steps, merges and corrections."""

import math

import pytest
import torch

from matrices.perturbing import perturb
from p4flows import MergeHook
from p4flows.matrices import OrthogonalMatrix

SIZE = 5
each_rank = pytest.mark.parametrize("rank", [1, 2, 5])
each_batch = pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)


def moved(batch=(), rank=1, size=SIZE, init="reverse", merges=3):
    """In float64, after several merges and with a perturbation on top."""
    matrix = OrthogonalMatrix(size, batch_shape=batch, rank=rank, init=init).double()
    generator = torch.Generator().manual_seed(1)
    for _ in range(merges):
        perturb(matrix, generator)
        assert matrix.merge().all()
    perturb(matrix, generator)
    return matrix


def deviation(matrix):
    """Largest entry of |AᵀA − I|, in float64."""
    wide = matrix.detach().double()
    return (wide.mT @ wide - torch.eye(wide.shape[-1])).abs().max().item()


def cayley(matrix):
    """(I − S/2)⁻¹ (I + S/2) with S = (u vᵀ − v uᵀ)/2."""
    half = matrix.u @ matrix.v.mT / 4
    half = half - half.mT
    identity = torch.eye(matrix.size, dtype=half.dtype)
    return torch.linalg.solve(identity - half, identity + half)


@each_batch
@each_rank
def test_readings_against_dense_matrices(rank, batch):
    matrix = moved(batch, rank)
    dense = cayley(matrix) @ matrix.frozen
    assert (dense - matrix.frozen).abs().amax((-2, -1)).min() > 0.05
    assert deviation(dense) < 1e-12
    torch.testing.assert_close(matrix.dense(), dense)
    torch.testing.assert_close(matrix.inverse(), torch.linalg.inv(dense))
    sign, logabsdet = matrix.slogdet()
    torch.testing.assert_close(sign, torch.linalg.det(dense))
    assert torch.equal(logabsdet, torch.zeros(batch, dtype=torch.float64))
    assert torch.equal(matrix.penalty(), torch.zeros(batch, dtype=torch.float64))
    x, bias = torch.randn(*batch, 4, SIZE).double(), torch.randn(*batch, SIZE).double()
    y = torch.einsum("...ij,...nj->...ni", dense, x)
    torch.testing.assert_close(matrix.multiply(x), y)
    torch.testing.assert_close(matrix.multiply(x, bias), y + bias.unsqueeze(-2))
    torch.testing.assert_close(matrix.solve(y), x)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("init", ["identity", "reverse"])
def test_sign_is_kept(init, size):
    matrix = moved(size=size, init=init, rank=size)
    expected = -1.0 if init == "reverse" and size in (2, 3) else 1.0
    assert matrix.sign.item() == matrix.slogdet()[0].item() == expected
    assert torch.linalg.det(matrix.dense()).item() == pytest.approx(expected)


@each_rank
def test_first_order_at_the_identity(rank):
    matrix = moved(rank=rank)
    matrix.merge()
    torch.testing.assert_close(matrix.dense(), matrix.frozen)
    step = torch.randn(SIZE, rank, dtype=torch.float64)

    def along(u):
        return torch.func.functional_call(matrix, {"u": u}, ())

    jacobian = torch.autograd.functional.jacobian(along, torch.zeros_like(step))
    derivative = torch.einsum("ijuk,uk->ij", jacobian, step)
    outer = step @ matrix.v.detach().mT
    torch.testing.assert_close(derivative, (outer - outer.mT) / 2 @ matrix.frozen)


@each_rank
def test_gradients_of_u(rank):
    matrix = moved((2,), rank)
    rows = torch.randn(2, 3, SIZE, dtype=torch.float64)

    def function(u):
        dense = torch.func.functional_call(matrix, {"u": u}, ())
        return dense, rows @ dense.mT, rows @ dense

    assert torch.autograd.gradcheck(function, [matrix.u.detach().clone().requires_grad_()])
    for read in (lambda: matrix.multiply(rows), lambda: matrix.solve(rows)):
        matrix.zero_grad()
        (rows * read()).sum().backward()
        assert matrix.u.grad.abs().max() > 1e-3


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_coordinates_are_dealt_in_turn(rank, size):
    matrix = OrthogonalMatrix(size, rank=rank)
    seen = []
    for _ in range(size // rank):
        columns = matrix.v.detach()
        assert torch.allclose(columns.mT @ columns, size / rank * torch.eye(rank))
        seen += columns.abs().argmax(0).tolist()
        matrix.merge()
    assert len(set(seen)) == size // rank * rank


@pytest.mark.parametrize("rank", [1, 3])
def test_a_step_of_sgd_is_an_unbiased_sketch_of_the_riemannian_one(rank):
    """Many copies of one matrix take one step each on a linear problem and merge."""
    count, lr = 20_000, 0.01
    torch.manual_seed(rank)
    start = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64)).Q
    matrix = OrthogonalMatrix(SIZE, batch_shape=(count,), rank=rank, init=start)
    optimizer = torch.optim.SGD(matrix.parameters(), lr=lr)
    hook = MergeHook(matrix, optimizer, every=1)
    x, target = torch.randn(8, SIZE).double(), torch.randn(8, SIZE).double()

    weight = start.clone().requires_grad_()
    (x @ weight.mT - target).square().mean().backward()
    y = matrix.multiply(x.expand(count, 8, SIZE))
    (y - target).square().mean((-2, -1)).sum().backward()
    optimizer.step()
    assert hook.stats.merged == count

    steps = (matrix.frozen - start) / -lr
    outer = weight.grad @ start.mT
    riemannian = (outer - outer.mT) / 2 @ start
    error = (steps.mean(0) - riemannian) / (steps.std(0) / math.sqrt(count))
    # Beyond the first order in lr there is a bias, here of less than a standard error.
    assert error.abs().max() < 4.5
    assert riemannian.norm() > 20 * (steps.std(0) / math.sqrt(count)).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 4])
def test_many_merges_stay_orthogonal_and_change_nothing(rank, dtype):
    torch.manual_seed(0)
    matrix = OrthogonalMatrix(16, batch_shape=(2,), rank=rank, init="reverse").to(dtype)
    generator = torch.Generator().manual_seed(2)
    eps = torch.finfo(dtype).eps
    for _ in range(300):
        perturb(matrix, generator)
        before = matrix.dense().detach()
        assert matrix.merge().all()
        assert (matrix.dense() - before).abs().max() < 20 * eps
        assert not matrix.u.any()
    drifted = deviation(matrix.frozen)
    assert eps < drifted < 300 * eps
    assert not matrix.correct().any()
    assert deviation(matrix.frozen) < min(8 * eps, drifted)
    torch.testing.assert_close(torch.linalg.det(matrix.frozen), matrix.sign)


def test_a_correction_goes_to_the_nearest_orthogonal_matrix():
    matrix = moved((4,))
    exact = matrix.frozen.clone()
    noise = torch.randn_like(exact)
    slight, strong, broken = 1e-3 * noise[0], 0.3 * noise[1], torch.nan
    for index, change in enumerate((slight, strong, broken)):
        matrix.frozen[index] += change
    left, _, right = torch.linalg.svd(matrix.frozen[:2])
    assert matrix.correct().tolist() == [False, True, False, False]
    torch.testing.assert_close(matrix.frozen[:2], left @ right, rtol=0, atol=1e-9)
    assert deviation(matrix.frozen[0]) < 1e-9 and deviation(matrix.frozen[1]) < 1e-14
    assert matrix.frozen[2].isnan().all()
    torch.testing.assert_close(matrix.frozen[3], exact[3])


def test_a_perturbation_that_is_not_finite_is_reset():
    matrix = moved((2,))
    before = matrix.frozen.clone()
    with torch.no_grad():
        matrix.u[1] = torch.nan
    outcome = matrix.attempt_merge()
    assert outcome.merged.tolist() == [True, False]
    assert outcome.reset.tolist() == [False, True]
    assert not outcome.forced.any()
    assert not torch.equal(matrix.frozen[0], before[0])
    assert torch.equal(matrix.frozen[1], before[1])


@pytest.mark.parametrize(
    "init",
    [2 * torch.eye(3), torch.tensor([[1.0, 0.1], [0.0, 1.0]]), torch.zeros(2, 2)],
    ids=["scaled", "sheared", "zero"],
)
def test_refuses_what_is_not_orthogonal(init):
    with pytest.raises(ValueError, match="init must be orthogonal, got a matrix with"):
        OrthogonalMatrix(len(init), init=init)


def test_rounding_of_init_is_corrected():
    exact = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    rounded = exact.float().double()
    assert deviation(rounded) > 1e-9
    assert deviation(OrthogonalMatrix(6, init=rounded).frozen) < 1e-14
