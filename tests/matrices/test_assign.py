"""`assign`: a perturbed matrix takes another matrix over."""

import pytest
import torch

from matrices.perturbing import perturb
from p4flows.matrices import InvertibleMatrix, OrthogonalMatrix

SIZE = 4
both_kinds = pytest.mark.parametrize("kind", [InvertibleMatrix, OrthogonalMatrix])


def moved(kind):
    matrix = kind(SIZE, batch_shape=(2,), rank=2, init="reverse").double()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        perturb(matrix, generator)
        assert matrix.merge().all()
    perturb(matrix, generator)
    return matrix


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_takes_a_matrix_over_and_starts_anew(kind, dtype):
    matrix = moved(kind)
    draws = matrix.draws.clone()
    new = torch.linalg.qr(torch.randn(2, SIZE, SIZE, dtype=dtype)).Q
    # Name, object, address and dtype: the optimizer keeps hold of the same tensors.
    tensors = [*matrix.named_parameters(), *matrix.named_buffers()]
    held = [(name, t, t.data_ptr(), t.dtype) for name, t in tensors]
    assert not torch.isclose(matrix.dense(), new.double(), atol=0.01).all()
    matrix.assign(new)
    torch.testing.assert_close(matrix.dense(), new.double(), rtol=0, atol=4e-7)
    assert not matrix.u.any()
    assert torch.equal(matrix.draws, draws + 1)
    for name, tensor, address, kind_of_number in held:
        now = getattr(matrix, name)
        assert now is tensor and now.data_ptr() == address, name
        assert now.dtype == kind_of_number, name
    torch.testing.assert_close(matrix.slogdet(), torch.linalg.slogdet(matrix.dense()))


def test_inverse_and_logabsdet_follow():
    matrix = moved(InvertibleMatrix)
    matrix.assign(torch.randn(SIZE, SIZE, dtype=torch.float64) + 2 * torch.eye(SIZE))
    error = matrix.error().worst()
    assert error.right < 1e-12 and error.logabsdet < 1e-12 and not error.wrong_sign


@both_kinds
@pytest.mark.parametrize(
    ("init", "error"),
    [
        (torch.zeros(SIZE, SIZE), ValueError),
        (torch.eye(SIZE + 1), ValueError),
        (torch.full((SIZE, SIZE), torch.nan), ValueError),
        ("diagonal", ValueError),
        (3, TypeError),
    ],
    ids=["outside", "shape", "nan", "name", "type"],
)
def test_refuses_and_keeps_what_it_has(kind, init, error):
    matrix = moved(kind)
    before = {name: value.clone() for name, value in matrix.state_dict().items()}
    with pytest.raises(error, match="init must"):
        matrix.assign(init)
    torch.testing.assert_close(matrix.state_dict(), before, rtol=0, atol=0)
