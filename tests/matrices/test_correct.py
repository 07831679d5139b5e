"""Correction of the stored inverse and log-determinant."""

import math

import pytest
import torch

from matrices.perturbing import additive, error_of
from p4flows.matrices import InvertibleMatrix

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
    # Two steps of order 3 leave the residual to the power of nine.
    assert rescued.item() == (not residual**9 < EPS[dtype])
    error = error_of(matrix)
    assert error.inverse < 10 * EPS[dtype]
    assert error.logabsdet < 20 * EPS[dtype]
    assert not error.sign
    assert torch.equal(matrix.frozen, frozen)


def test_a_correction_takes_the_sign_from_the_matrix():
    matrix = InvertibleMatrix(3, init="reverse")
    matrix.sign.neg_()
    matrix.correct()
    assert not error_of(matrix).sign


def test_a_correction_is_of_the_frozen_matrix_alone():
    matrix = inexact(1e-2)
    with torch.no_grad():
        matrix.u.fill_(0.1)
    u, v = matrix.u.clone(), matrix.v.clone()
    matrix.correct()
    assert error_of(matrix).inverse < 1e-14
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
    matrix.inverse_frozen[0] *= 1.001  # refined
    matrix.inverse_frozen[1] *= 5.0  # rebuilt
    matrix.inverse_frozen[2] = math.nan  # rebuilt
    matrix.frozen[3] = torch.ones(2, 2)  # singular
    assert matrix.correct().tolist() == [False, True, True, False]
    torch.testing.assert_close(matrix.inverse_frozen, torch.eye(2).expand(4, 2, 2))


@pytest.mark.parametrize("dtype", EPS, ids=str)
@torch.no_grad()
def test_a_forced_merge_through_the_singular_matrices_is_repaired(dtype):
    """G = 1e-6: the stored inverse loses six digits and more, in float32 all it had."""
    start = torch.eye(SIZE) + 0.3 * SIZE**-0.5 * normal(SIZE, SIZE)
    matrix = additive(SIZE, init=start.to(dtype))
    matrix.u.copy_(normal(SIZE, 1, seed=2))
    matrix.u.mul_((-1 + 1e-6) / (matrix.v.mT @ matrix.inverse_frozen @ matrix.u))
    assert matrix.merge(force=True)
    assert error_of(matrix).inverse > 1e-12
    # One step back, to where the matrix is well conditioned again.
    matrix.u.copy_(-normal(SIZE, 1, seed=3))
    assert matrix.merge(force=True)
    matrix.correct()
    condition = torch.linalg.cond(matrix.frozen.double()).item()
    assert condition < 1000
    assert error_of(matrix).inverse < 4 * EPS[dtype] * condition
    assert error_of(matrix).logabsdet < 4 * EPS[dtype] * condition
