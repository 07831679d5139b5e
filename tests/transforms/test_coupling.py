"""AffineCoupling against its formula."""

import math

import pytest
import torch
from torch import nn

from p4flows.transforms import AffineCoupling
from transforms.registry import move


@pytest.mark.parametrize(("features", "conditioning"), [(2, 1), (5, 3), (60, 30)])
def test_first_features_scale_and_shift_the_others(features, conditioning):
    torch.manual_seed(0)
    coupling = AffineCoupling(features, hidden=(7,)).double()
    move(coupling)
    x = torch.randn(6, features, dtype=torch.float64)
    first, second = x[:, :conditioning], x[:, conditioning:]
    log_scale = coupling.log_scale_factor.exp() * coupling.scale_net(first).tanh()
    expected = torch.cat([first, second * log_scale.exp() + coupling.shift_net(first)], -1)
    outputs, logabsdet = coupling(x)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(logabsdet, log_scale.sum(-1))
    assert not torch.allclose(outputs[:, conditioning:], second)


def test_scales_are_bounded_at_the_start():
    coupling = AffineCoupling(4)
    _, logabsdet = coupling(1e4 * torch.randn(100, 4))
    # One ulp more than two saturated features give, as the bound is reached.
    assert logabsdet.abs().max().item() <= 2 * math.exp(-1.0) * (1 + 1e-6)


def test_nets_have_the_given_layers():
    coupling = AffineCoupling(5, (6, 7), shift_activation=nn.SiLU, scale_activation=nn.ELU)
    for net, activation in ((coupling.shift_net, nn.SiLU), (coupling.scale_net, nn.ELU)):
        sizes = [(m.in_features, m.out_features) for m in net if isinstance(m, nn.Linear)]
        assert sizes == [(3, 6), (6, 7), (7, 2)]
        assert [type(m) for m in net[1::2]] == [activation, activation]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": 1}, ValueError, "features must be at least 2 to be split, got 1"),
        ({"features": 0}, ValueError, "features must be a positive int, got 0"),
        ({"features": 4.0}, TypeError, "features must be a positive int, got float"),
        ({"hidden": (6, 0)}, ValueError, r"hidden\[1\] must be a positive int, got 0"),
        ({"hidden": (6.0,)}, TypeError, r"hidden\[0\] must be a positive int, got float"),
        ({"hidden": 60}, TypeError, "hidden must be a sequence of widths, got int"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        AffineCoupling(**{"features": 4, **arguments})
