"""dtype, device and sizes of a layer that is made; beginning anew."""

import numpy as np
import pytest
import torch

from p4flows import (
    BentStack,
    InvertibleMatrix,
    MergeHook,
    OrthogonalMatrix,
    P4InvTransform,
    P4OrthogonalTransform,
    bent_stacked_flow,
    realnvp_flow,
    spline_flow,
)

LAYERS = {
    "inv": lambda n=3, **options: P4InvTransform(n, init="reverse", **options),
    "additive": lambda n=3, **options: P4InvTransform(n, perturbation="additive", **options),
    "orthogonal": P4OrthogonalTransform,
    "stack": lambda n=3, **options: BentStack(n, 2, **options),
}
each_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def trained(layer, steps=7):
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    MergeHook(layer, optimizer, every=3)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs, logabsdet = layer(torch.randn(5, 3))
        (outputs.square().sum(-1) - logabsdet).mean().backward()
        optimizer.step()
    return layer


def round_trip(layer, dtype=torch.float32):
    x = torch.randn(5, 3, dtype=dtype)
    outputs, logabsdet = layer(x)
    back, _ = layer.inverse(outputs)
    torch.testing.assert_close(back, x, atol=1e-3, rtol=1e-3)
    return outputs, logabsdet


@each_layer
def test_dtype_is_that_asked_for(build):
    layer = build(3, dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert layer.matrix.frozen.dtype == torch.float64
    outputs, _ = round_trip(layer, torch.float64)
    assert outputs.dtype == torch.float64


@each_layer
def test_half_precision_keeps_its_matrix_in_float32(build):
    layer = build(3, dtype=torch.bfloat16)
    assert layer.matrix.u.dtype == torch.bfloat16
    assert layer.matrix.frozen.dtype == torch.float32


@each_layer
@pytest.mark.parametrize("how", ["argument", "context"])
def test_meta_device_then_empty_then_reset(build, how):
    if how == "argument":
        layer = build(3, device="meta")
    else:
        with torch.device("meta"):
            layer = build(3)
    tensors = [*layer.parameters(), *layer.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    layer.reset_parameters()  # nothing to do there
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(7)
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    expected = build(3)
    for name, value in expected.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    trained(layer)
    round_trip(layer)


@each_layer
def test_reset_parameters_is_a_fresh_layer(build):
    layer = build(3)
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    trained(layer)
    hook_alive = [p.data_ptr() for p in layer.parameters()]
    layer.reset_parameters()
    assert [p.data_ptr() for p in layer.parameters()] == hook_alive
    for name, value in layer.state_dict().items():
        # The directions come from a seed of their own.
        if not name.endswith((".v", ".seed", ".fingerprint")):
            assert torch.equal(value, start[name]), name
    assert not torch.equal(layer.matrix.seed, start["matrix.seed"])
    assert (layer.matrix.error().worst().ratio <= 1).all()


def test_reset_of_a_matrix_that_was_given_is_the_identity():
    layer = P4InvTransform(3, init=torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    layer.reset_parameters()
    assert torch.equal(layer.weight(), torch.eye(3))


def test_device_and_dtype_of_init_give_way():
    matrix = InvertibleMatrix(2, init=torch.eye(2, dtype=torch.float64), dtype=torch.float32)
    assert matrix.frozen.dtype == torch.float32
    assert InvertibleMatrix(2, init=torch.eye(2), device="meta").u.is_meta


@pytest.mark.parametrize("kind", [InvertibleMatrix, OrthogonalMatrix])
def test_sizes_may_be_numpys(kind):
    matrix = kind(np.int64(3), rank=np.int32(2), batch_shape=(np.int64(2),))
    assert matrix.u.shape == (2, 3, 2)


def test_sizes_of_layers_and_flows_may_be_numpys():
    n, blocks = np.int64(4), np.int64(2)
    x = torch.randn(3, 4)
    hidden = (np.int64(5),)
    layers = [P4InvTransform(n), P4OrthogonalTransform(n, rank=np.int64(2)), BentStack(n, blocks)]
    for layer in layers:
        assert layer(x)[0].shape == (3, 4)
    flows = [
        bent_stacked_flow(n, blocks),
        realnvp_flow(n, blocks, hidden=hidden),
        spline_flow(n, blocks, hidden=hidden, bins=np.int64(4)),
    ]
    for flow in flows:
        assert flow.log_prob(x).shape == (3,)
        assert flow.sample(2).shape == (2, 4)
    assert MergeHook(layers[0], every=np.int64(7)).every == 7


@pytest.mark.parametrize("wrong", [True, 2.0, np.float64(2), "2"])
def test_other_sizes_are_refused(wrong):
    with pytest.raises(TypeError, match="features must be a positive int"):
        P4InvTransform(wrong)
