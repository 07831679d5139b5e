"""Spline couplings against nflows' spline, and what a circle asks for."""

import math

import pytest
import torch
from nflows.transforms.splines.rational_quadratic import rational_quadratic_spline

from p4flows import P4InvTransform
from p4flows.transforms import ColumnsTransform, SplineCoupling
from p4flows.transforms.spline import rational_quadratic
from transforms.registry import move


@pytest.fixture
def coupling():
    torch.manual_seed(0)
    made = SplineCoupling(5, [0, 2, 4], circular=[3, 4], hidden=(8,), bins=6).double()
    move(made)
    return made


@pytest.mark.parametrize("inverse", [False, True])
def test_spline_is_that_of_nflows(inverse):
    torch.manual_seed(0)
    inputs = torch.rand(50, 4, dtype=torch.float64)
    sizes = torch.randn(3, 50, 4, 7, dtype=torch.float64)
    ends = torch.cat([sizes[2], torch.randn(50, 4, 1, dtype=torch.float64)], -1)
    # nflows' slopes are 1 at ln(e^(1 − 1e-3) − 1), ours at 0.
    expected = rational_quadratic_spline(
        inputs, sizes[0], sizes[1], ends + math.log(math.expm1(1.0 - 1e-3)), inverse=inverse
    )
    found = rational_quadratic(inputs, sizes[:2].movedim(0, -2), ends, inverse=inverse)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[0], inputs, atol=0.05)


def test_beyond_the_bound_a_line_is_left_alone(coupling):
    x = torch.zeros(3, 5, dtype=torch.float64)
    x[:, 0] = torch.tensor([5.5, -7.0, 1e6])
    x[:, 2] = -x[:, 0]
    outputs, logabsdet = coupling(x)
    assert torch.equal(outputs[:, :3], x[:, :3])
    # What is left is the circular column's.
    assert (logabsdet - logabsdet[0]).abs().max() == 0.0 and logabsdet[0] != 0.0


def test_circles_have_no_seam(coupling):
    """Outputs, log-determinants and their slopes are the same on both sides of ±π."""
    x = torch.randn(4, 5, dtype=torch.float64)
    for column in (3, 4):
        sides = []
        for angle in (-math.pi + 1e-9, math.pi - 1e-9):
            at = x.clone()
            at[:, column] = angle
            sides.append(coupling(at))
        (left, right), logabsdets = zip(*sides, strict=True)
        apart = torch.remainder(left[:, 3:] - right[:, 3:] + 1.0, 2.0 * math.pi) - 1.0
        assert apart.abs().max() < 1e-6
        torch.testing.assert_close(left[:, :3], right[:, :3], rtol=0, atol=1e-6)
        torch.testing.assert_close(*logabsdets, rtol=0, atol=1e-6)


def test_the_density_on_the_circle_integrates_to_one(coupling):
    """One circular column given the others: exp(logabsdet)/2π is its density."""
    angles = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)[:-1]
    x = torch.zeros(len(angles), 5, dtype=torch.float64)
    x[:, 0] = x[:, 2] = 9.0  # beyond the bound, where their log-determinant is zero
    x[:, 4] = angles
    density = coupling(x)[1].exp() / (2.0 * math.pi)
    assert density.mean().item() * 2.0 * math.pi == pytest.approx(1.0, abs=1e-4)
    assert density.max() > 1.2 * density.min()


def test_conditioning_columns_are_left_alone(coupling):
    x = torch.randn(6, 5, dtype=torch.float64).clamp(-3.0, 3.0)
    outputs, _ = coupling(x)
    assert torch.equal(outputs[:, [1, 3]], x[:, [1, 3]])
    assert ((outputs - x)[:, [0, 2, 4]].abs() > 1e-6).all()


def test_a_coupling_starts_near_the_identity_but_for_a_turn():
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    outputs, logabsdet = SplineCoupling(4, [0, 3], circular=[3])(x)
    assert logabsdet.abs().max() < 0.05
    assert (outputs - x)[:, :3].abs().max() < 0.05
    turn = torch.remainder(outputs[:, 3] - x[:, 3], 2.0 * math.pi)
    assert turn.std() < 0.05 and 0.1 < turn.mean() < 6.2


def test_far_apart_float32_inputs_round_trip():
    torch.manual_seed(0)
    coupling = SplineCoupling(6, [0, 1, 2], circular=[0, 3])
    with torch.no_grad():
        coupling.net[-1].weight.normal_(std=0.05)
    x = 10.0 * torch.randn(1000, 6)
    x[:, [0, 3]] = (2.0 * torch.rand(1000, 2) - 1.0) * math.pi
    outputs, logabsdet = coupling(x)
    assert logabsdet.abs().max() > 1.0
    back, inverse_logabsdet = coupling.inverse(outputs)
    apart = (back - x).abs()
    apart[:, 0] = torch.minimum(apart[:, 0], 2.0 * math.pi - apart[:, 0])
    assert apart.max() < 1e-3
    assert (logabsdet + inverse_logabsdet).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": 0}, ValueError, "features must be a positive int, got 0"),
        ({"transformed": []}, ValueError, "transformed must be some of the 4 columns, got 0"),
        ({"transformed": [0, 1, 2, 3]}, ValueError, "some of the 4 columns, got 4"),
        ({"transformed": [4]}, ValueError, "transformed must hold columns from 0 to 3, got 4"),
        ({"transformed": [1, 1]}, ValueError, "transformed must hold each column once"),
        ({"transformed": 2}, TypeError, "transformed must be a sequence of columns, got int"),
        ({"circular": [1.0]}, TypeError, "circular must hold ints, got float"),
        ({"circular": [-1]}, ValueError, "circular must hold columns from 0 to 3, got -1"),
        ({"hidden": (6, 0)}, ValueError, r"hidden\[1\] must be a positive int, got 0"),
        ({"bins": 1}, ValueError, "bins must be at least 2, got 1"),
        ({"bound": 0.0}, ValueError, r"bound must be positive, got 0\.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SplineCoupling(**{"features": 4, "transformed": [1], **arguments})


def test_columns_are_handed_over_in_their_order():
    layer = P4InvTransform(2, init=torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    outputs, logabsdet = ColumnsTransform(3, [2, 0], layer)(torch.tensor([[1.0, 10.0, 100.0]]))
    assert outputs.tolist() == [[3.0, 10.0, 102.0]]
    assert logabsdet.item() == pytest.approx(math.log(3.0))


@pytest.mark.parametrize(
    ("columns", "transform", "error", "message"),
    [
        ([], P4InvTransform(1), ValueError, "columns must name at least one column"),
        ([0, 3], P4InvTransform(2), ValueError, "columns must hold columns from 0 to 2, got 3"),
        ([0, 1], P4InvTransform(3), ValueError, "transform must have 2 features, got 3"),
        ([0], torch.nn.Linear(1, 1), TypeError, "must be an nflows Transform, got Linear"),
    ],
)
def test_columns_that_do_not_suit_are_refused(columns, transform, error, message):
    with pytest.raises(error, match=message):
        ColumnsTransform(3, columns, transform)
