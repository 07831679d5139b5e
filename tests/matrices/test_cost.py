"""Nothing that happens in a training step or a merge costs more than O(n²k)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from matrices.perturbing import perturb
from p4flows.matrices import InvertibleMatrix, OrthogonalMatrix

SIZE = 64
RANKS = [1, 3]
both_kinds = pytest.mark.parametrize("kind", [InvertibleMatrix, OrthogonalMatrix])


def read_backward(matrix):
    rows = torch.ones(*matrix.batch_shape, 2, matrix.size)
    total = matrix.multiply(rows).sum() + matrix.solve(rows).sum() + matrix.slogdet()[1].sum()
    (total + matrix.penalty().sum()).backward()


CHEAP = {
    "dense": lambda matrix: matrix.dense(),
    "inverse": lambda matrix: matrix.inverse(),
    "slogdet": lambda matrix: matrix.slogdet(),
    "merge": lambda matrix: matrix.merge(force=True),
    "reset": lambda matrix: matrix.reset(),
    "training": read_backward,
}


class Work(TorchDispatchMode):
    """Counts multiplications in matrix products, collects linear algebra on n × n matrices."""

    def __init__(self, size):
        super().__init__()
        self.size, self.multiplications, self.factorisations = size, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() > 1]
        if "mm" in name:  # the factors come last: mm, bmm, addmm, baddbmm_
            left, right = matrices[-2:]
            self.multiplications += left.numel() * right.shape[-1]
        large = any(min(matrix.shape[-2:]) >= self.size for matrix in matrices)
        if large and "linalg" in name and "norm" not in name:
            self.factorisations.append(name)
        return function(*args, **(kwargs or {}))


def work(kind, call, size, rank=1, batch=()):
    matrix = kind(size, rank=rank, batch_shape=batch)
    perturb(matrix, torch.Generator().manual_seed(0))
    with Work(size) as found:
        call(matrix)
    return found


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", CHEAP)
@both_kinds
def test_no_cubic_work(kind, name, rank, batch):
    small, large = (work(kind, CHEAP[name], size, rank, batch) for size in (SIZE, 2 * SIZE))
    assert not small.factorisations
    assert large.multiplications <= 4.1 * small.multiplications
    if name != "reset" and (kind, name) != (OrthogonalMatrix, "slogdet"):
        assert small.multiplications > 0


@both_kinds
def test_the_test_sees_cubic_work(kind):
    small, large = (work(kind, lambda matrix: matrix.correct(), size) for size in (SIZE, 2 * SIZE))
    assert small.factorisations or large.multiplications == 8 * small.multiplications


def training_step(rows, size, rank):
    matrix = InvertibleMatrix(size, rank=rank)
    x, bias = torch.ones(rows, size, requires_grad=True), torch.zeros(size, requires_grad=True)
    with Work(size) as found:
        y, logabsdet = matrix.multiply_and_logabsdet(x, bias)
        (y.sum() + logabsdet.sum()).backward()
    return found.multiplications


@pytest.mark.parametrize("rows, size, rank", [(64, 32, 1), (64, 32, 32), (16, 64, 8), (256, 64, 8)])
def test_a_step_takes_the_way_of_fewer_multiplications(rows, size, rank):
    n, k = size, rank
    by_factors = 2 * rows * n * n + 5 * rows * n * k
    by_matrix = 3 * rows * n * n + 2 * n * n * k
    # vᵀu, and its gradient.
    g = 2 * n * k * k
    assert training_step(rows, n, k) <= min(by_factors, by_matrix) + g
