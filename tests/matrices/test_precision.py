"""Rows, parameters and autocast of any precision; A, A⁻¹ and ln|det A| in float32 at least."""

import copy

import pytest
import torch
from torch import nn
from transforms.registry import move

from matrices.perturbing import KINDS
from p4flows import BentStack, P4InvTransform, P4OrthogonalTransform
from p4flows.matrices import InvertibleMatrix, OrthogonalMatrix

LAYERS = {
    "relative": lambda: P4InvTransform(6, rank=2),
    "additive": lambda: P4InvTransform(6, rank=2, perturbation="additive"),
    "orthogonal": lambda: P4OrthogonalTransform(6, rank=2),
    "stack": lambda: BentStack(6, 2, rank=2),
    "stack-additive": lambda: BentStack(6, 2, rank=2, perturbation="additive"),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_direction = pytest.mark.parametrize("direction", ["forward", "inverse"])


def moved(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    move(layer)
    return layer


@each_direction
@each_layer
def test_autocast_changes_nothing(name, direction):
    layer, x = moved(name), torch.randn(20, 6)
    expected = getattr(layer, direction)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = getattr(layer, direction)(x)
        narrow = getattr(layer, direction)(x.bfloat16())
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert narrow[0].dtype == torch.float32
    torch.testing.assert_close(narrow[0], expected[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("read", ["dense", "inverse", "slogdet", "penalty"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_autocast_changes_no_reading(kind, read):
    matrix = InvertibleMatrix(6, rank=2, perturbation=kind)
    matrix.u.normal_(std=0.5)
    expected = getattr(matrix, read)()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(getattr(matrix, read)(), expected, rtol=0, atol=0)


@each_layer
def test_autocast_merges_as_without(name):
    layer = moved(name)
    twin = copy.deepcopy(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.matrix.merge()
    twin.matrix.merge()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


@each_direction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_layer
def test_a_narrow_module_keeps_what_it_stores(name, dtype, direction):
    layer = moved(name)
    before = {key: value.clone() for key, value in layer.matrix.named_buffers()}
    layer.to(dtype)
    for key, value in layer.matrix.named_buffers():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = torch.randn(20, 6).to(dtype)
    outputs, logabsdet = getattr(layer, direction)(x)
    assert outputs.dtype == dtype and logabsdet.dtype == torch.float32
    # The same numbers, in float32 from end to end.
    wide = copy.deepcopy(layer).float()
    expected = getattr(wide, direction)(x.float())
    torch.testing.assert_close(outputs, expected[0].to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(logabsdet, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_layer
def test_a_narrow_module_trains_and_merges(name, dtype):
    layer = moved(name).to(dtype)
    outputs, logabsdet = layer(torch.randn(5, 6, dtype=dtype))
    (outputs.float().square().sum() - logabsdet.sum()).backward()
    assert layer.matrix.u.grad.dtype == dtype and layer.matrix.u.grad.any()
    matrix = layer.matrix
    with torch.no_grad():
        dense, slogdet = matrix.dense(), matrix.slogdet()
        assert matrix.merge(force=True).all()
        assert dense.dtype == torch.float32
        torch.testing.assert_close(matrix.frozen, dense, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(matrix.slogdet(), slogdet, rtol=1e-5, atol=1e-5)
    assert matrix.error().worst().ratio <= 30
    assert matrix.u.dtype == matrix.v.dtype == dtype


def test_narrow_from_the_start():
    matrix = InvertibleMatrix(3, init=torch.eye(3, dtype=torch.bfloat16))
    assert matrix.frozen.dtype == matrix.sign.dtype == torch.float32
    assert matrix.u.dtype == torch.bfloat16
    weight = nn.Linear(3, 3).bfloat16()
    layer = P4InvTransform(3, init=weight.weight.detach() + 2 * torch.eye(3).bfloat16())
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.ones(1, 3).bfloat16())[0].dtype == torch.bfloat16


def test_there_and_back_through_a_narrow_dtype_loses_parameters_alone():
    layer = moved("relative").double()
    frozen = layer.matrix.frozen.clone()
    layer.bfloat16().double()
    torch.testing.assert_close(layer.matrix.frozen, frozen, rtol=1e-7, atol=1e-7)
    assert layer.matrix.error().ratio <= 1


@each_direction
@each_layer
def test_another_dtype_or_device_is_refused_by_name(name, direction):
    layer = moved(name)
    with pytest.raises(
        TypeError, match=r"inputs must be torch\.float32 as the layer is, got torch\.float64: use"
    ):
        getattr(layer, direction)(torch.randn(5, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="inputs must be on cpu as the layer is, got meta: use"):
        getattr(layer, direction)(torch.randn(5, 6, device="meta"))


def test_a_cached_layer_refuses_them_too():
    layer = P4InvTransform(6, using_cache=True).eval()
    with torch.no_grad(), pytest.raises(TypeError, match=r"must be torch\.float32 as the layer"):
        layer(torch.randn(5, 6, dtype=torch.float64))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "orthogonal"])
def test_layers_of_any_batch_shape(kind, batch):
    options = {"batch_shape": batch, "rank": 2}
    if kind == "orthogonal":
        matrix = OrthogonalMatrix(4, **options).double()
    else:
        matrix = InvertibleMatrix(4, perturbation=kind, **options).double()
    with torch.no_grad():
        matrix.u.normal_(std=0.3)
    x = torch.randn(*batch, 5, 4, dtype=torch.float64)
    bias = torch.randn(*batch, 4, dtype=torch.float64)
    y, logabsdet = matrix.multiply_and_logabsdet(x, bias)
    expected = torch.einsum("...ij,...nj->...ni", matrix.dense(), x) + bias.unsqueeze(-2)
    torch.testing.assert_close(y, expected)
    slogdet = torch.linalg.slogdet(matrix.dense()).logabsdet
    torch.testing.assert_close(logabsdet, slogdet.unsqueeze(-1).expand(*batch, 5))
    back, negative = matrix.solve_and_logabsdet(y, bias)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(negative, -logabsdet)
    (back.sum() + logabsdet.sum()).backward()
    assert matrix.u.grad.any()
