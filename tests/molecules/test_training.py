"""The loss of equation 6 and the weights of a Boltzmann generator, where they are known exactly."""

import math

import pytest
import torch
from nflows.flows.base import Flow
from nflows.transforms.base import CompositeTransform
from nflows.transforms.standard import PointwiseAffineTransform

from p4flows import MergeHook, realnvp_flow
from p4flows.flows.base import BaseNormal

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")

SCALE, WIDTH = 3.0, 0.5


def gaussian_flow(scale):
    """A flow of two features whose samples have standard deviation 1/scale."""
    return Flow(
        PointwiseAffineTransform(scale=torch.full((2,), scale, dtype=torch.float64)), BaseNormal(2)
    ).double()


@pytest.fixture
def coordinates():
    """features = SCALE · positions."""
    return PointwiseAffineTransform(scale=torch.tensor([SCALE, SCALE])).double()


def harmonic(positions):
    """−ln of a Gaussian of standard deviation WIDTH, without its normalisation."""
    return 0.5 * (positions / WIDTH).square().sum(-1)


def test_energy_loss_is_the_reverse_kl_divergence(coordinates):
    torch.manual_seed(0)
    scale = 0.8
    found = molecules.energy_loss(gaussian_flow(scale), coordinates, harmonic, 200_000)
    # Positions are Gaussian of variance s², and E[u] − ln s² is J_e of two of them.
    width = 1.0 / (scale * SCALE)
    expected = (width / WIDTH) ** 2 - 2.0 * math.log(width)
    assert found.item() == pytest.approx(expected, abs=0.01)


def test_mixed_loss_weights_add_up_to_one(coordinates):
    flow, batch = gaussian_flow(0.8), torch.randn(50, 2, dtype=torch.float64)
    likelihood = -flow.log_prob(batch).mean()
    for ratio in (0.0, 0.05, 2.0):
        torch.manual_seed(1)
        found = molecules.mixed_loss(coordinates, harmonic, ratio=ratio)(flow, batch)
        torch.manual_seed(1)
        reverse = molecules.energy_loss(flow, coordinates, harmonic, 50)
        weight = ratio / (1.0 + ratio)
        torch.testing.assert_close(found, (1.0 - weight) * likelihood + weight * reverse)


def test_weights_make_averages_exact(coordinates):
    torch.manual_seed(0)
    # Wider than the target, so that weights are bounded.
    positions, energies, log_weights = molecules.sample_with_weights(
        gaussian_flow(0.5), coordinates, harmonic, 100_000
    )
    torch.testing.assert_close(energies, harmonic(positions))
    weights = torch.softmax(log_weights, 0)
    assert positions.var().item() == pytest.approx((1 / (0.5 * SCALE)) ** 2, rel=0.02)
    assert (weights @ positions.square()).mean().item() == pytest.approx(WIDTH**2, rel=0.02)


def test_weights_of_a_perfect_generator_are_equal(coordinates):
    flow = gaussian_flow(1.0 / (SCALE * WIDTH))
    _, _, log_weights = molecules.sample_with_weights(flow, coordinates, harmonic, 100)
    torch.testing.assert_close(log_weights, log_weights[:1].expand(100))
    assert molecules.effective_sample_size(log_weights) == pytest.approx(1.0)


def test_effective_sample_size_and_free_energies():
    log_weights = torch.tensor([3.0, 3.0, -math.inf, -math.inf]) + 500.0
    assert molecules.effective_sample_size(log_weights) == pytest.approx(0.5)
    first = torch.tensor([True, False, True, False])
    assert molecules.free_energy_difference(log_weights, first, ~first) == pytest.approx(0.0)
    log_weights[1] += 2.0
    assert molecules.free_energy_difference(log_weights, first, ~first) == pytest.approx(-2.0)


def test_a_negative_ratio_is_refused(coordinates):
    with pytest.raises(ValueError, match=r"ratio must not be negative, got -0\.1"):
        molecules.mixed_loss(coordinates, harmonic, ratio=-0.1)


def test_a_cap_that_is_none_is_refused(coordinates):
    with pytest.raises(ValueError, match=r"cap must have low < high, got \(3.0, 2.0\)"):
        molecules.mixed_loss(coordinates, harmonic, cap=(3.0, 2.0))


def test_the_loss_caps_energies(coordinates):
    flow, batch = gaussian_flow(0.8), torch.randn(50, 2, dtype=torch.float64)
    highest = 5.0 + math.log1p(15.0)
    found = []
    for energy, cap in (
        (lambda x: 50.0 + harmonic(x), (5.0, 20.0)),
        (lambda x: torch.full_like(x[:, 0], highest), None),
    ):
        torch.manual_seed(1)
        found.append(molecules.mixed_loss(coordinates, energy, ratio=2.0, cap=cap)(flow, batch))
    torch.testing.assert_close(*found)


def test_energy_based_training_lowers_energies(molecule, frames):
    torch.manual_seed(0)
    data = frames.float()
    coordinates = molecules.MixedCoordinateTransform(data, molecule.topology)
    features = coordinates(data)[0]
    energy, cap = molecules.OpenMMEnergy(molecule.system, 600.0), (50.0, 1e20)
    flow = realnvp_flow(60, 2, hidden=(16,))
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    hook = MergeHook(flow, optimizer, every=5)
    start = energy(coordinates.inverse(flow.sample(200))[0]).median()
    loss = molecules.mixed_loss(coordinates, energy, ratio=1.0, cap=cap)
    for _ in range(30):
        optimizer.zero_grad()
        loss(flow, features[torch.randint(400, (32,))]).backward()
        optimizer.step()
    assert hook.stats.merged > 0
    assert energy(coordinates.inverse(flow.sample(200))[0]).median() < start - 1.0


def test_a_flow_of_positions_is_a_composite(molecule, frames):
    coordinates = molecules.MixedCoordinateTransform(frames, molecule.topology)
    inner = realnvp_flow(60, 1, hidden=(8,)).double()
    whole = Flow(CompositeTransform([coordinates, inner._transform]), inner._distribution)
    features, logabsdet = coordinates(frames[:3])
    expected = inner.log_prob(features) + logabsdet
    torch.testing.assert_close(whole.log_prob(frames[:3]), expected)
    assert whole.sample(2).shape == (2, 66)
