"""P4InvTransform as an nflows `Linear`: a drop-in, its initial matrix, its cost, its training."""

import re

import pytest
import torch
from nflows.distributions.normal import StandardNormal
from nflows.flows.base import Flow
from nflows.transforms import (
    CompositeTransform,
    LULinear,
    MaskedAffineAutoregressiveTransform,
    NaiveLinear,
    QRLinear,
    SVDLinear,
)
from nflows.transforms.linear import Linear
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from p4flows import MergeHook, P4InvTransform
from transforms.registry import move


def moved(features=4, **options):
    torch.manual_seed(0)
    layer = P4InvTransform(features, **options).double()
    move(layer)
    return layer


@pytest.mark.parametrize("rank", [1, 3])
def test_weight_inverse_and_logabsdet_are_those_of_the_map(rank):
    layer = moved(rank=rank)
    x = torch.randn(7, 4, dtype=torch.float64)
    weight = layer.weight()
    assert isinstance(layer, Linear)
    torch.testing.assert_close(layer(x)[0], F.linear(x, weight, layer.bias))
    torch.testing.assert_close(layer.weight_inverse(), torch.linalg.inv(weight))
    torch.testing.assert_close(layer.logabsdet(), torch.linalg.slogdet(weight).logabsdet)
    assert layer.logabsdet().shape == ()


NFLOWS_LAYERS = {
    "LULinear": lambda: LULinear(3, identity_init=False),
    "NaiveLinear": lambda: NaiveLinear(3, orthogonal_initialization=False),
    "P4InvTransform": lambda: moved(3, rank=2),
    "QRLinear": lambda: QRLinear(3, num_householder=2),
    "SVDLinear": lambda: SVDLinear(3, num_householder=2),
}


@pytest.mark.parametrize("name", NFLOWS_LAYERS)
def test_takes_over_the_map_of_another_layer(name):
    torch.manual_seed(0)
    other = NFLOWS_LAYERS[name]()
    with torch.no_grad():
        other.bias.normal_()
    layer = P4InvTransform(3, init=other)
    x = torch.randn(5, 3, dtype=other.bias.dtype)
    expected, logabsdet = other(x)
    torch.testing.assert_close(layer(x), (expected, logabsdet))
    assert layer.bias.dtype == layer.matrix.frozen.dtype == other.bias.dtype
    with torch.no_grad():
        layer.bias.zero_()
        layer.matrix.frozen.zero_()
    torch.testing.assert_close(other(x), (expected, logabsdet))


def test_initial_matrices():
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert P4InvTransform(3)(x)[0].tolist() == [[1.0, 2.0, 3.0]]
    assert P4InvTransform(3, init="reverse")(x)[0].tolist() == [[3.0, 2.0, 1.0]]
    weight = torch.tensor([[0, 2, 0], [1, 0, 0], [0, 0, -3]])
    layer = P4InvTransform(3, init=weight)
    torch.testing.assert_close(layer(x)[0], torch.tensor([[4.0, 1.0, -9.0]]))
    torch.testing.assert_close(layer.logabsdet(), torch.tensor(6.0).log())
    assert P4InvTransform(3, init=weight.double()).bias.dtype == torch.float64


def test_other_layer_without_bias():
    zero = LULinear(3)
    assert P4InvTransform(3, init=zero, bias=False).bias is None
    assert not P4InvTransform(3, init=P4InvTransform(3, bias=False)).bias.any()
    with torch.no_grad():
        zero.bias.fill_(0.5)
    with pytest.raises(ValueError, match="bias=False cannot take over the non-zero bias of init"):
        P4InvTransform(3, init=zero, bias=False)


SINGULAR = torch.ones(3, 3)
INFINITE = torch.full((3, 3), float("inf"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": 0}, ValueError, "features must be a positive int, got 0"),
        ({"features": 2.0}, TypeError, "features must be a positive int, got float"),
        ({"features": True}, TypeError, "features must be a positive int, got bool"),
        ({"rank": 0}, ValueError, "rank must be between 1 and 3 (the size), got 0"),
        ({"rank": 4}, ValueError, "rank must be between 1 and 3 (the size), got 4"),
        ({"rank": 1.0}, TypeError, "rank must be an int, got float"),
        ({"init": "zero"}, ValueError, "init must be one of ['identity', 'reverse'] or a tensor"),
        ({"init": [[1.0]]}, TypeError, "init must be a name or a tensor, got list"),
        ({"init": torch.eye(2)}, ValueError, "init must have shape (3, 3), got (2, 2)"),
        ({"init": LULinear(2)}, ValueError, "init must have shape (3, 3), got (2, 2)"),
        ({"init": SINGULAR}, ValueError, "init must be invertible, got a matrix that is singular"),
        ({"init": INFINITE}, ValueError, "init must be finite, got NaN or infinite entries"),
        ({"bounds": (-1, 1)}, TypeError, "bounds must be MergeBounds, got tuple"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        P4InvTransform(**{"features": 3, **options})


class CubicOperations(TorchDispatchMode):
    """Records operations that cost O(n³): factorisations and products of two n × n matrices."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        square = [
            t
            for t in args
            if isinstance(t, torch.Tensor) and t.shape[-2:] == (self.size, self.size)
        ]
        factorises = "linalg" in name and "norm" not in name and len(square) > 0
        multiplies = name in ("mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_")
        # The first argument of the additive ones is no factor.
        factors = square if name in ("mm", "bmm") else [t for t in square if t is not args[0]]
        if factorises or (multiplies and len(factors) > 1):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rank", [1, 2])
def test_a_training_step_does_no_cubic_work(rank):
    layer = P4InvTransform(32, rank=rank)
    move(layer)
    optimizer = torch.optim.Adam(layer.parameters())
    hook = MergeHook(layer, optimizer, every=1, correct_every=None)
    x = torch.randn(5, 32, requires_grad=True)
    layer(x)  # `move` has written v
    with CubicOperations(32) as cubic:
        for pass_ in (layer.forward, layer.inverse):
            outputs, logabsdet = pass_(x)
            (outputs.square().mean() - logabsdet.mean() + hook.penalty(0.1)).backward()
            optimizer.step()
    assert hook.stats.merged == 2
    assert cubic.found == []


def test_cubic_work_would_be_found():
    layer = P4InvTransform(32)
    with CubicOperations(32) as cubic:
        layer.matrix.correct()
    assert {"linalg_inv_ex", "_linalg_slogdet"} <= set(cubic.found)


def test_trains_through_the_inverse():
    torch.manual_seed(0)
    target = torch.tensor([[1.5, -0.4, 0.0], [0.3, 0.8, 0.2], [-0.2, 0.1, 1.2]])
    layer = P4InvTransform(3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    hook = MergeHook(layer, optimizer, every=10)
    for _ in range(1000):
        y = torch.randn(64, 3)
        loss = (layer.inverse(y @ target.mT + 1.0)[0] - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert hook.stats.merged > 50
    torch.testing.assert_close(layer.weight().detach(), target, rtol=0, atol=0.02)
    torch.testing.assert_close(layer.bias.detach(), torch.ones(3), rtol=0, atol=0.02)


def test_replaces_lulinear_in_a_flow_of_nflows():
    torch.manual_seed(0)
    blocks = []
    for _ in range(2):
        blocks += [MaskedAffineAutoregressiveTransform(3, hidden_features=8)]
        blocks += [P4InvTransform(3, init=LULinear(3, identity_init=False))]
    flow = Flow(CompositeTransform(blocks), StandardNormal([3]))
    for layer in blocks[1::2]:  # not the nets, which amplify rounding without bound then
        move(layer)
    samples, log_prob = flow.sample_and_log_prob(10)
    torch.testing.assert_close(flow.log_prob(samples), log_prob, rtol=1e-3, atol=1e-3)
