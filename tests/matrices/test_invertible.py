"""InvertibleMatrix read through its perturbation, its penalty, and what it refuses."""

import math

import pytest
import torch

from matrices.perturbing import KINDS, additive, perturb, set_factors
from p4flows.matrices import InvertibleMatrix, MergeBounds

SIZE = 4
INF = math.inf
each_rank = pytest.mark.parametrize("rank", [1, 2, 4])
each_batch = pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)


each_kind = pytest.mark.parametrize("kind", KINDS)


def moved(batch=(), rank=1, bounds=MergeBounds(), size=SIZE, merges=3, kind="additive"):
    """In float64, after several merges and with a perturbation on top."""
    start = torch.eye(size, dtype=torch.float64).flip(0)
    matrix = InvertibleMatrix(
        size, batch_shape=batch, rank=rank, init=start, bounds=bounds, perturbation=kind
    )
    matrix.v.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    for _ in range(merges):
        perturb(matrix, generator)
        assert matrix.merge(force=True).all()
    perturb(matrix, generator)
    return matrix


@each_batch
@each_rank
@each_kind
def test_readings_against_torch(kind, rank, batch):
    matrix = moved(batch, rank, kind=kind)
    update = torch.einsum("...ik,...jk->...ij", matrix.u, matrix.v)
    dense = matrix.frozen + (update if kind == "additive" else update @ matrix.frozen)
    assert (matrix.dense() - matrix.frozen).abs().amax((-2, -1)).min() > 0.05
    torch.testing.assert_close(matrix.dense(), dense)
    torch.testing.assert_close(matrix.inverse(), torch.linalg.inv(dense), rtol=1e-9, atol=1e-9)
    sign, logabsdet = torch.linalg.slogdet(dense)
    assert torch.equal(matrix.slogdet()[0], sign)
    torch.testing.assert_close(matrix.slogdet()[1], logabsdet, rtol=1e-9, atol=1e-9)
    x, bias = torch.randn(*batch, 5, SIZE).double(), torch.randn(*batch, SIZE).double()
    y = torch.einsum("...ij,...nj->...ni", dense, x)
    torch.testing.assert_close(matrix.multiply(x), y)
    torch.testing.assert_close(matrix.multiply(x, bias), y + bias.unsqueeze(-2))
    torch.testing.assert_close(matrix.solve(y), x, rtol=1e-9, atol=1e-9)


@each_kind
def test_a_negative_determinant_has_its_sign(kind):
    matrix = moved((40,), kind=kind)
    assert set(matrix.slogdet()[0].tolist()) == {-1.0, 1.0}


@each_rank
@each_kind
@pytest.mark.parametrize(
    "read",
    [
        lambda matrix: matrix.dense(),
        lambda matrix: matrix.inverse(),
        lambda matrix: matrix.slogdet()[1],
        lambda matrix: matrix.multiply(torch.ones(2, 3, SIZE, dtype=torch.float64)),
        lambda matrix: matrix.solve(torch.ones(2, 3, SIZE, dtype=torch.float64)),
        lambda matrix: matrix.penalty(),
    ],
    ids=["dense", "inverse", "slogdet", "multiply", "solve", "penalty"],
)
def test_gradients_of_u_and_v(read, kind, rank):
    bounds = MergeBounds(penalty_update=(1.0, 2.0), penalty_logabsdet=(-2.0, -1.0))
    matrix = moved((2,), rank, bounds, kind=kind)

    names = ["u"] if kind == "relative" else ["u", "v"]
    trained = {f"matrix.{name}": getattr(matrix, name) for name in names}

    def function(*factors):
        given = dict(zip(trained, factors, strict=True))
        return torch.func.functional_call(Reading(matrix, read), given, ())

    factors = [factor.detach().clone().requires_grad_() for factor in trained.values()]
    assert torch.autograd.gradcheck(function, factors)


class Reading(torch.nn.Module):
    def __init__(self, matrix, read):
        super().__init__()
        self.matrix, self.read = matrix, read

    def forward(self):
        return self.read(self.matrix)


def appendix_a(update, logabsdet):
    """g(u, v)/C_p as it is printed, C_min = −2 and C_max = 15."""
    return sum(
        max(value - 15, 0) ** 2 + max(-2 - value, 0) ** 2 for value in (update, logabsdet + update)
    )


@pytest.mark.parametrize("update", [-5.0, -2.5, -1.0, 0.0, 3.0, 12.0, 16.0])
@pytest.mark.parametrize("logabsdet", [-4.0, 0.5, 6.0, 18.0])
def test_penalty_is_that_of_appendix_a(update, logabsdet):
    scale = math.exp(logabsdet / 2)
    start = scale * torch.eye(2, dtype=torch.float64)
    matrix = additive(2, init=start, bounds=MergeBounds.paper())
    set_factors(matrix, [[scale * (-math.exp(update) - 1)], [0.0]], [[1.0], [0.3]])
    penalty = matrix.penalty()
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(appendix_a(update, logabsdet), abs=1e-9)
    penalty.backward()
    flat = penalty.item() == 0.0
    for factor in (matrix.u, matrix.v):
        assert factor.grad.isfinite().all()
        assert flat == torch.equal(factor.grad, torch.zeros(2, 1))


@pytest.mark.parametrize("bounds", [MergeBounds(), MergeBounds(penalty_update=(-INF, INF))])
def test_penalty_is_finite_at_infinite_bounds(bounds):
    matrix = moved((3,), bounds=bounds)
    set_factors(matrix, 1e4 * matrix.u, matrix.v)
    matrix.penalty().sum().backward()
    assert matrix.penalty().isfinite().all()
    assert matrix.u.grad.isfinite().all()
    if bounds.penalty_update == (-INF, INF):
        assert torch.equal(matrix.penalty(), torch.zeros(3, dtype=torch.float64))


def test_constants_of_the_paper():
    bounds = MergeBounds.paper()
    assert bounds.update == (-6.0, INF)
    assert bounds.logabsdet == (-2.5, 15.5)
    assert bounds.penalty_update == bounds.penalty_logabsdet == (-2.0, 15.0)


@pytest.mark.parametrize("name", ["update", "logabsdet", "penalty_update", "penalty_logabsdet"])
def test_bounds_that_cross(name):
    for interval in [(1.0, -1.0), (2.0, 2.0), (INF, INF), (math.nan, 1.0)]:
        with pytest.raises(ValueError, match=f"{name} must have low < high, got .*{interval[1]}"):
            MergeBounds(**{name: interval})
    for interval in [3.0, (1.0,), ("a", "b"), None, (1.0, 2.0, 3.0)]:
        with pytest.raises(TypeError, match=f"{name} must be a pair of numbers, got"):
            MergeBounds(**{name: interval})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_start_from_a_name(dtype):
    torch.set_default_dtype(dtype)
    try:
        identity, reverse = InvertibleMatrix(3), InvertibleMatrix(3, init="reverse", rank=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(identity.dense(), torch.eye(3, dtype=dtype))
    expected = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=dtype)
    assert torch.equal(reverse.dense(), expected)
    assert torch.equal(reverse.inverse(), expected)
    assert [value.item() for value in reverse.slogdet()] == [-1.0, 0.0]
    assert {p.dtype for p in (*reverse.parameters(), reverse.inverse_frozen)} == {dtype}


def test_start_from_a_tensor():
    given = torch.tensor([[0.0, 2.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    matrix = InvertibleMatrix(2, batch_shape=(3,), init=given)
    assert torch.equal(matrix.dense(), given.expand(3, 2, 2))
    torch.testing.assert_close(matrix.inverse(), torch.linalg.inv(given).expand(3, 2, 2))
    assert matrix.sign.tolist() == [-1.0] * 3
    assert not matrix.frozen.requires_grad
    matrix.frozen[0].zero_()
    assert given[0, 1] == 2.0
    assert InvertibleMatrix(2, init=torch.tensor([[0, 1], [1, 0]])).frozen.dtype == torch.float32
    batch = torch.stack([torch.eye(2), 2 * torch.eye(2)])
    assert torch.equal(InvertibleMatrix(2, batch_shape=(2,), init=batch).frozen, batch)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be a positive int, got 0"),
        ({"size": -2}, ValueError, "size must be a positive int, got -2"),
        ({"size": 2.0}, TypeError, "size must be a positive int, got float"),
        ({"size": True}, TypeError, "size must be a positive int, got bool"),
        ({"rank": 0}, ValueError, r"rank must be between 1 and 2 \(the size\), got 0"),
        ({"rank": 3}, ValueError, r"rank must be between 1 and 2 \(the size\), got 3"),
        ({"rank": 1.0}, TypeError, "rank must be an int, got float"),
        ({"rank": True}, TypeError, "rank must be an int, got bool"),
        ({"batch_shape": 3}, TypeError, "batch_shape must be a tuple, got int"),
        ({"batch_shape": (2, 0)}, ValueError, "each of batch_shape must be a positive int, got 0"),
        (
            {"perturbation": "absolute"},
            ValueError,
            "perturbation must be 'relative' or 'additive', got 'absolute'",
        ),
        ({"bounds": (-6, 6)}, TypeError, "bounds must be MergeBounds, got tuple"),
        (
            {"init": "zeros"},
            ValueError,
            r"init must be one of \['identity', 'reverse'\] or a tensor",
        ),
        ({"init": 1.0}, TypeError, "init must be a name or a tensor, got float"),
        ({"init": torch.eye(3)}, ValueError, r"init must have shape \(2, 2\), got \(3, 3\)"),
        ({"init": torch.ones(2)}, ValueError, r"init must have shape \(2, 2\), got \(2,\)"),
        ({"init": torch.eye(2).expand(3, 2, 2)}, ValueError, r"shape \(2, 2\), got \(3, 2, 2\)"),
        (
            {"init": torch.ones(2, 2)},
            ValueError,
            "init must be invertible, got a matrix that is sin",
        ),
        ({"init": torch.zeros(2, 2)}, ValueError, "init must be invertible"),
        (
            {"init": torch.diag(torch.tensor([1.0, 1e-8]))},
            ValueError,
            r"condition number 1\.0e\+08",
        ),
        (
            {"init": torch.full((2, 2), math.nan)},
            ValueError,
            "init must be finite, got NaN or infini",
        ),
        ({"init": torch.eye(2) / 0}, ValueError, "init must be finite"),
        ({"init": torch.eye(2) * 1j}, TypeError, r"init must be real, got torch\.complex64"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        InvertibleMatrix(**{"size": 2, **arguments})


def test_what_is_singular_depends_on_the_dtype():
    small = torch.diag(torch.tensor([1.0, 1e-8], dtype=torch.float64))
    assert InvertibleMatrix(2, init=small).logabsdet_frozen == pytest.approx(math.log(1e-8))


def test_repr_names_size_batch_and_rank():
    text = repr(InvertibleMatrix(3, batch_shape=(2,), rank=2))
    assert text == ("InvertibleMatrix(size=3, batch_shape=(2,), rank=2, perturbation='relative')")
    assert repr(additive(3)) == "InvertibleMatrix(size=3, rank=1, perturbation='additive')"


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (2, 2), (64, 64), (65, 64), (1024, 256)])
def test_the_default_rank_grows_with_the_size(size, rank):
    assert InvertibleMatrix(size).rank == rank
