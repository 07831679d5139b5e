"""The hand-written gradients: first and second order, beside those of dense matrices."""

import pytest
import torch

from matrices.perturbing import KINDS, perturb
from p4flows.matrices import InvertibleMatrix

DIRECTIONS = ["multiply_and_logabsdet", "solve_and_logabsdet"]


each_kind = pytest.mark.parametrize("kind", KINDS)
# With five rows of four features, Ã is formed at rank 3, not at rank 1.
each_rank = pytest.mark.parametrize("rank", [1, 3])


def off_identity(rank, kind):
    generator = torch.Generator().manual_seed(0)
    matrix = InvertibleMatrix(4, rank=rank, perturbation=kind).double()
    for _ in range(3):
        perturb(matrix, generator)
        assert matrix.merge()
    perturb(matrix, generator)
    rows = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    return matrix, rows, bias


def trained(matrix):
    return [p for p in matrix.parameters() if p.requires_grad]


def by_dense_matrices(direction, matrix, rows, bias):
    dense = matrix.dense()
    logabsdet = torch.linalg.slogdet(dense).logabsdet.expand(len(rows))
    shift = 0.0 if bias is None else bias
    if direction.startswith("multiply"):
        return rows @ dense.mT + shift, logabsdet
    return torch.linalg.solve(dense, (rows - shift).mT).mT, -logabsdet


@pytest.mark.parametrize("with_bias", [True, False])
@each_rank
@each_kind
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_to_dense_matrices(direction, rank, with_bias, kind):
    matrix, rows, bias = off_identity(rank, kind)
    bias = bias if with_bias else None
    wanted = [rows, *trained(matrix), *([bias] if with_bias else [])]
    weights = (torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64))

    plain = by_dense_matrices(direction, matrix, rows, bias)
    written = getattr(matrix, direction)(rows, bias=bias)
    torch.testing.assert_close(written, plain)
    torch.testing.assert_close(
        torch.autograd.grad(written, wanted, weights), torch.autograd.grad(plain, wanted, weights)
    )


@each_rank
@each_kind
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_first_and_second_derivatives(direction, rank, kind):
    matrix, rows, bias = off_identity(rank, kind)

    def function(rows, bias, *factors):
        # The factors are the matrix's own parameters, which gradcheck perturbs in place.
        return getattr(matrix, direction)(rows, bias)

    inputs = (rows, bias, *trained(matrix))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@each_rank
@each_kind
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_gradient_of_rows_is_formed_unless_asked_for(direction, kind, rank):
    matrix, rows, bias = off_identity(rank, kind)
    asked = getattr(matrix, direction)(rows, bias)
    expected = torch.autograd.grad([t.sum() for t in asked], [*trained(matrix), bias])
    outputs = getattr(matrix, direction)(rows.detach(), bias)
    gradients = torch.autograd.grad([t.sum() for t in outputs], [*trained(matrix), bias])
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
    expected = getattr(matrix, direction)(rows, bias)
    assert torch.equal(outputs, expected[0]) and torch.equal(logabsdet, expected[1])
    (outputs.float().sum() + logabsdet.float().sum()).backward()
    assert all(p.grad.any() for p in trained(matrix))


@each_rank
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_v_of_a_relative_perturbation_is_never_trained(direction, rank):
    matrix, rows, bias = off_identity(rank, "relative")
    matrix.requires_grad_()  # as `flow.requires_grad_()` does
    sum(t.sum() for t in getattr(matrix, direction)(rows, bias)).backward()
    assert matrix.u.grad.any() and matrix.v.grad is None


@each_rank
def test_the_relative_map_does_not_read_the_inverse(rank):
    matrix, rows, bias = off_identity(rank, "relative")
    expected = matrix.multiply_and_logabsdet(rows, bias)
    matrix.inverse_frozen.fill_(torch.nan)
    outputs = matrix.multiply_and_logabsdet(rows, bias)
    torch.testing.assert_close(outputs, expected)
    sum(t.sum() for t in outputs).backward()
    assert matrix.u.grad.isfinite().all()
