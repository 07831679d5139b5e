"""The hand-written gradients: first and second order, and what falls back to plain operations."""

import pytest
import torch

from matrices.perturbing import KINDS, perturb
from p4flows.matrices import InvertibleMatrix
from p4flows.matrices.perturbed import PerturbedMatrix

DIRECTIONS = ["multiply_and_logabsdet", "solve_and_logabsdet"]


each_kind = pytest.mark.parametrize("kind", KINDS)
# With five rows of four features, the relative map forms its matrix at rank 3, not at rank 1.
each_rank = pytest.mark.parametrize("rank", [1, 3])


def off_identity(rank, kind):
    generator = torch.Generator().manual_seed(0)
    matrix = InvertibleMatrix(4, rank=rank, perturbation=kind).double()
    matrix.v.requires_grad_()
    for _ in range(3):
        perturb(matrix, generator)
        assert matrix.merge()
    perturb(matrix, generator)
    rows = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    return matrix, rows, bias


@pytest.mark.parametrize("with_bias", [True, False])
@each_rank
@each_kind
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_to_plain_operations(direction, rank, with_bias, kind):
    matrix, rows, bias = off_identity(rank, kind)
    bias = bias if with_bias else None
    wanted = [t for t in (rows, bias, matrix.u, matrix.v) if t is not None]
    weights = (torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64))

    plain = getattr(PerturbedMatrix, direction)(matrix, rows, bias)
    written = getattr(matrix, direction)(rows, bias)
    torch.testing.assert_close(written, plain)
    torch.testing.assert_close(
        torch.autograd.grad(written, wanted, weights), torch.autograd.grad(plain, wanted, weights)
    )


@each_rank
@each_kind
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_first_and_second_derivatives(direction, rank, kind):
    matrix, rows, bias = off_identity(rank, kind)

    def function(rows, bias, u, v):
        # The factors are the matrix's own parameters, which gradcheck perturbs in place.
        return getattr(matrix, direction)(rows, bias)

    inputs = (rows, bias, matrix.u, matrix.v)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@each_rank
@each_kind
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_gradient_of_rows_is_formed_unless_asked_for(direction, kind, rank):
    matrix, rows, bias = off_identity(rank, kind)
    asked = getattr(matrix, direction)(rows, bias)
    expected = torch.autograd.grad([t.sum() for t in asked], [matrix.u, matrix.v, bias])
    outputs = getattr(matrix, direction)(rows.detach(), bias)
    gradients = torch.autograd.grad([t.sum() for t in outputs], [matrix.u, matrix.v, bias])
    torch.testing.assert_close(gradients, expected)


@each_rank
@each_kind
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logabsdet_may_be_written_to(direction, kind, rank):
    matrix, rows, bias = off_identity(rank, kind)
    _, logabsdet = getattr(matrix, direction)(rows, bias)
    before = logabsdet.detach().clone()
    logabsdet += torch.arange(5)
    torch.testing.assert_close(logabsdet, before + torch.arange(5))


# From within torch.func.jacfwd.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@each_kind
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_transforms_of_torch_func(direction, kind):
    matrix, rows, bias = off_identity(2, kind)
    weight = matrix.dense() if direction.startswith("multiply") else matrix.inverse()

    def row(x):
        return getattr(matrix, direction)(x[None], bias)[0][0]

    jacobians = torch.func.vmap(torch.func.jacrev(row))(rows)
    torch.testing.assert_close(jacobians, weight.expand_as(jacobians))
    torch.testing.assert_close(torch.func.jacfwd(row)(rows[0]), weight)


@each_kind
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_trains_under_autocast(direction, kind):
    matrix, rows, bias = off_identity(1, kind)
    matrix, rows, bias = matrix.float(), rows.detach().float(), bias.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, logabsdet = getattr(matrix, direction)(rows, bias)
        plain = getattr(PerturbedMatrix, direction)(matrix, rows, bias)
    torch.testing.assert_close((outputs, logabsdet), plain)
    (outputs.float().sum() + logabsdet.float().sum()).backward()
    assert matrix.u.grad.any() and matrix.v.grad.any()


@each_rank
@each_kind
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_whether_v_is_trained_changes_nothing_else(direction, kind, rank):
    matrix, rows, bias = off_identity(rank, kind)
    outputs = getattr(matrix, direction)(rows, bias)
    expected = torch.autograd.grad([t.sum() for t in outputs], [rows, bias, matrix.u])
    matrix.v.requires_grad_(False)
    outputs = getattr(matrix, direction)(rows, bias)
    gradients = torch.autograd.grad([t.sum() for t in outputs], [rows, bias, matrix.u])
    torch.testing.assert_close(gradients, expected)


@each_rank
def test_the_relative_map_does_not_read_the_inverse(rank):
    matrix, rows, bias = off_identity(rank, "relative")
    expected = matrix.multiply_and_logabsdet(rows, bias)
    matrix.inverse_frozen.fill_(torch.nan)
    outputs = matrix.multiply_and_logabsdet(rows, bias)
    torch.testing.assert_close(outputs, expected)
    sum(t.sum() for t in outputs).backward()
    assert matrix.u.grad.isfinite().all() and matrix.v.grad.isfinite().all()
