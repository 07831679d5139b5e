"""`error()` against numbers that are known by hand."""

import math

import pytest
import torch

from p4flows.matrices import InvertibleMatrix, OrthogonalMatrix

EPS = torch.finfo(torch.float32).eps


def scaled(batch=()):
    """diag(4, 1/2) with an inverse of its own that is off in one entry, and ln|det| by 1/8."""
    matrix = InvertibleMatrix(2, batch_shape=batch, init=torch.diag(torch.tensor([4.0, 0.5])))
    matrix.inverse_frozen[..., 0, 1] += 2**-10
    matrix.logabsdet_frozen += 0.125
    return matrix


def test_both_residuals_are_told_apart():
    error = scaled().error()
    # A E = [[0, 4e], [0, 0]] and E A = [[0, e/2], [0, 0]].
    assert error.right.item() == 2**-8
    assert error.left.item() == 2**-11
    assert error.logabsdet.item() == pytest.approx(0.125)
    assert error.condition.item() == 8.0
    # ‖R‖₁ = 4e, ‖A‖₁ = 4, ‖X‖₁ = 2 + e.
    assert error.ratio.item() == pytest.approx(2**-8 / (2 * EPS * 4 * (2 + 2**-10)))
    assert not error.wrong_sign
    assert all(field.shape == () for field in error)


def test_the_carry_of_the_logabsdet_counts():
    matrix = InvertibleMatrix(2, init=torch.diag(torch.tensor([3.0, 0.7])))
    assert matrix.error().logabsdet < 1e-9
    assert matrix.logabsdet_carry != 0
    matrix.logabsdet_carry.zero_()
    assert 1e-9 < matrix.error().logabsdet < 1e-7


def test_a_batch_is_measured_matrix_by_matrix_and_reduced_to_the_worst():
    matrix = scaled((2, 2))
    matrix.correct()
    matrix.inverse_frozen[1, 0, 0, 0] = 1.0
    matrix.sign[0, 1] = -1.0
    matrix.frozen[1, 1] = torch.ones(2, 2)
    error = matrix.error()
    assert error.right.tolist() == [[0.0, 0.0], [3.0, 2.0]]
    assert error.wrong_sign.tolist() == [[False, True], [False, True]]
    assert error.condition.tolist() == [[8.0, 8.0], [8.0, math.inf]]
    worst = error.worst()
    assert (worst.right, worst.condition, worst.wrong_sign) == (3.0, math.inf, True)
    assert worst.logabsdet == math.inf


def test_what_is_not_finite_is_not_hidden():
    matrix = scaled((2,))
    matrix.inverse_frozen[1, 0, 0] = math.nan
    assert matrix.error().worst().right.isnan()
    assert matrix.error().worst().ratio.isnan()
    matrix.logabsdet_frozen[0] = math.nan
    assert matrix.error().worst().logabsdet.isnan()


def test_a_perturbation_has_no_part_in_it():
    matrix = scaled()
    before = matrix.error()
    with torch.no_grad():
        matrix.u.fill_(0.3)
    assert matrix.error() == before


def test_of_an_orthogonal_matrix():
    matrix = OrthogonalMatrix(3, init="reverse")
    assert matrix.error().worst().ratio == 0 and not matrix.error().wrong_sign
    matrix.sign.neg_()
    assert matrix.error().wrong_sign


def test_a_matrix_that_was_written_from_outside_is_right_again():
    matrix = OrthogonalMatrix(3, init="reverse")
    matrix.frozen[0, 0] = 2**-7
    assert matrix.error().worst().ratio <= 1
    matrix = scaled()
    matrix.frozen.mul_(3.0)
    assert matrix.error().worst().ratio <= 1 and matrix.error().logabsdet < 1e-6
