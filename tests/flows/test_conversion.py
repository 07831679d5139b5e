"""plain and swap_linear: the same function before and after."""

import copy

import pytest
import torch
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, LULinear
from torch import nn

from p4flows import (
    BentStack,
    MergeHook,
    P4InvTransform,
    P4OrthogonalTransform,
    bent_stacked_flow,
    invertible,
    orthogonal,
    plain,
    realnvp_flow,
    swap_linear,
)
from p4flows.matrices import PerturbedMatrix


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def moved(module):
    """Off its start: a merge, then a perturbation and a bias."""
    for _ in range(2):
        for matrix in module.modules():
            if isinstance(matrix, PerturbedMatrix):
                matrix.merge()
                matrix.u.normal_(std=0.1)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    return module


MODULES = {
    "linear": lambda: P4InvTransform(3, rank=2, init="reverse"),
    "without-bias": lambda: P4InvTransform(3, bias=False),
    "orthogonal": lambda: P4OrthogonalTransform(3),
    "one-sign": lambda: P4InvTransform(3, init=torch.diag(torch.tensor([1.0, -2.0, 3.0]))),
    "all-signs": lambda: P4InvTransform(3, init=-torch.eye(3)),
    "stack": lambda: BentStack(3, blocks=2),
    "composite": lambda: CompositeTransform([P4InvTransform(3), P4OrthogonalTransform(3)]),
}


# nflows' LULinear solves by it in the inverse direction.
@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_plain_is_the_same_function(build):
    layer = moved(build()).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    layer(x)  # `moved` has written v
    before = copy.deepcopy(layer.state_dict())
    other = plain(layer)
    for direction in ("forward", "inverse"):
        torch.testing.assert_close(getattr(other, direction)(x), getattr(layer, direction)(x))
        assert getattr(layer, direction)(x)[0].sub(x).abs().max() > 0.1
    assert not any(isinstance(each, PerturbedMatrix) for each in other.modules())
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "flow", [lambda: bent_stacked_flow(2, 3), lambda: realnvp_flow(2, 2, hidden=(4,))]
)
def test_plain_flows_have_the_same_density(flow):
    flow = moved(flow()).eval()
    x = torch.randn(7, 2)
    torch.testing.assert_close(plain(flow).log_prob(x), flow.log_prob(x), rtol=1e-4, atol=1e-4)
    assert isinstance(plain(flow), Flow)


def test_plain_weights_of_any_module():
    module = moved(nn.Sequential(invertible(nn.Linear(3, 3)), orthogonal(nn.Linear(3, 3))))
    x = torch.randn(5, 3)
    other = plain(module)
    torch.testing.assert_close(other(x), module(x))
    assert [type(layer) for layer in other] == [nn.Linear, nn.Linear]
    assert sorted(other.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_a_layer_used_twice_stays_one_layer():
    layer = P4InvTransform(3)
    first, second = plain(nn.ModuleList([layer, layer]))
    assert first is second


def lu(features, **options):
    layer = LULinear(features, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def test_swap_linear_keeps_the_function():
    composite = CompositeTransform([lu(3), P4InvTransform(3), lu(3)]).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = composite(x)
    swapped = swap_linear(composite, rank=2, perturbation="additive", using_cache=True)
    assert swapped is composite
    layers = list(composite._transforms)
    assert [type(layer) for layer in layers] == 3 * [P4InvTransform]
    for layer in (layers[0], layers[2]):
        assert (layer.matrix.rank, layer.matrix.perturbation) == (2, "additive")
        assert layer.using_cache
    torch.testing.assert_close(swapped(x), expected)
    hook = MergeHook(swapped, every=1)
    optimizer = torch.optim.SGD(swapped.parameters(), lr=0.01)
    swapped(x)[0].square().sum().backward()
    optimizer.step()
    assert hook.stats.merged == 3


def test_swap_linear_of_a_layer_itself():
    layer = lu(3)
    torch.testing.assert_close(swap_linear(layer).weight(), layer.weight())


def test_what_cannot_be_swapped():
    with pytest.raises(ValueError, match=r"must have a linear layer .* there is none in Linear"):
        swap_linear(nn.Linear(2, 2))
    for function in (plain, swap_linear):
        with pytest.raises(TypeError, match=r"module must be an nn\.Module, got str"):
            function("flow")
