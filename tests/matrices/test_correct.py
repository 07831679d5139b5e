"""Correction of the stored inverse and log-determinant."""

import math

import pytest
import torch

from matrices.perturbing import additive
from p4flows.matrices import InvertibleMatrix
from p4flows.matrices.merge import merge_together

SIZE = 16
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inexact(residual, dtype=torch.float64):
    """A matrix whose stored inverse leaves ‖A X − I‖ = `residual`, and whose logabsdet is off."""
    error = normal(SIZE, SIZE, seed=1)
    error *= residual / torch.linalg.matrix_norm(error)
    matrix = InvertibleMatrix(
        SIZE, init=(torch.eye(SIZE) + 0.3 * SIZE**-0.5 * normal(SIZE, SIZE)).to(dtype)
    )
    identity = torch.eye(SIZE, dtype=torch.float64)
    matrix.inverse_frozen.copy_(torch.linalg.inv(matrix.frozen.double()) @ (identity - error))
    matrix.logabsdet_frozen.add_(0.1)
    return matrix


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("residual", [1e-4, 1e-2, 0.1, 0.5, 0.9, 3.0, 1e6, math.inf, math.nan])
def test_one_correction_repairs_all_there_is(residual, dtype):
    matrix = inexact(residual, dtype)
    frozen = matrix.frozen.clone()
    rescued = matrix.correct()
    assert rescued.shape == ()
    # Frobenius norms: a tenth of ‖A⁻¹‖ is about 0.1·√n.
    assert rescued.item() == (not residual < 0.45)
    error = matrix.error().worst()
    assert error.ratio <= 1
    assert max(error.right, error.left) < 10 * EPS[dtype]
    assert error.logabsdet < 20 * EPS[dtype]
    assert not error.wrong_sign
    assert torch.equal(matrix.frozen, frozen)


def conditioned(size, condition, dtype, seed=0):
    """A matrix with singular values spread evenly, on a logarithmic scale, over `condition`."""
    left, right = (torch.linalg.qr(normal(size, size, seed=seed + i)).Q for i in range(2))
    singular = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
    return InvertibleMatrix(size, init=((left * singular) @ right).to(dtype))


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e6])
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_a_correction_never_makes_an_inverse_worse(dtype, condition):
    """Iterating on I − A·X leaves |X A − I| at eps·cond²: 1.8 in float32 at 1e5."""
    matrix = conditioned(64, condition, dtype)
    by_lu = matrix.error()
    for _ in range(2):
        matrix.correct()
        error = matrix.error()
        assert error.right <= by_lu.right and error.left <= by_lu.left
        assert error.ratio <= 1
    assert max(error.right, error.left) < 4 * EPS[dtype] * condition
    assert condition < error.condition < 64 * condition


def test_a_round_trip_survives_corrections_at_high_condition():
    matrix = conditioned(64, 1e5, torch.float32)
    x = normal(100, 64, seed=9).float()
    for _ in range(3):
        matrix.correct()
    with torch.no_grad():
        back = matrix.solve(matrix.multiply(x))
    assert (back - x).abs().max() < 0.05


def test_a_correction_takes_the_sign_from_the_matrix():
    matrix = InvertibleMatrix(3, init="reverse")
    matrix.sign.neg_()
    matrix.correct()
    assert not matrix.error().worst().wrong_sign


def test_a_correction_is_of_the_frozen_matrix_alone():
    matrix = inexact(1e-2)
    with torch.no_grad():
        matrix.u.fill_(0.1)
    u, v = matrix.u.clone(), matrix.v.clone()
    matrix.correct()
    assert matrix.error().worst().right < 1e-14
    assert torch.equal(matrix.u, u)
    assert torch.equal(matrix.v, v)
    assert matrix.draws == 1


@pytest.mark.parametrize("stored", [1.0, math.nan])
def test_a_singular_matrix_keeps_its_state(stored):
    matrix = InvertibleMatrix(2)
    matrix.frozen.copy_(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    matrix.inverse_frozen.fill_(stored)
    matrix.logabsdet_frozen.fill_(-7.0)
    assert not matrix.correct()
    assert torch.equal(
        matrix.inverse_frozen.nan_to_num(2.0), torch.full((2, 2), stored).nan_to_num(2.0)
    )
    assert (matrix.sign.item(), matrix.logabsdet_frozen.item()) == (1.0, -7.0)


def test_an_inverse_too_large_for_its_dtype_keeps_the_state():
    matrix = InvertibleMatrix(2)
    matrix.frozen.mul_(1e-39)
    assert not matrix.correct()
    assert torch.equal(matrix.inverse_frozen, torch.eye(2))
    assert matrix.logabsdet_frozen.isfinite()


def test_in_a_batch_each_matrix_has_its_own_fate():
    matrix = InvertibleMatrix(2, batch_shape=(4,))
    matrix.inverse_frozen[0] *= 1.001  # a thousandth off
    matrix.inverse_frozen[1] *= 5.0  # lost
    matrix.inverse_frozen[2] = math.nan  # lost
    matrix.frozen[3] = torch.ones(2, 2)  # singular
    assert matrix.correct().tolist() == [False, True, True, False]
    torch.testing.assert_close(matrix.inverse_frozen, torch.eye(2).expand(4, 2, 2))


@pytest.mark.parametrize("dtype", EPS, ids=str)
@torch.no_grad()
def test_a_forced_merge_through_the_singular_matrices_is_repaired(dtype):
    """With a G of so little, the stored inverse would lose all digits but one."""
    start = torch.eye(SIZE) + 0.3 * SIZE**-0.5 * normal(SIZE, SIZE)
    matrix = additive(SIZE, init=start.to(dtype))
    matrix.v.copy_(normal(SIZE, 1, seed=4))
    matrix.u.copy_(normal(SIZE, 1, seed=2))
    small = 1e3 * EPS[dtype]
    matrix.u.mul_((-1 + small) / (matrix.v.mT @ matrix.inverse_frozen @ matrix.u))
    report = merge_together([matrix], force=True)
    assert report.outcome.forced
    error = matrix.error()
    assert error.condition * small > 1e2
    # Both are computed in float64, which knows a condition number κ to within κ eps.
    known = max(1e-2, EPS[torch.float64] * error.condition.item())
    assert report.condition == pytest.approx(error.condition.item(), rel=known)
    assert error.ratio <= 30 and not error.wrong_sign
    assert error.logabsdet < SIZE * EPS[dtype] * error.condition
    # One step back, to where the matrix is well conditioned again and the loss would show.
    matrix.v.copy_(normal(SIZE, 1, seed=5))
    matrix.u.copy_(-normal(SIZE, 1, seed=3))
    report = merge_together([matrix], force=True)
    assert report.outcome.merged and report.corrected
    error = matrix.error()
    assert error.condition < 1e5
    assert error.ratio <= 1 and not error.wrong_sign and error.logabsdet < 4 * EPS[dtype]
