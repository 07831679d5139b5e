"""Distances between sets of structures, where they are known exactly."""

import math

import numpy as np
import pytest

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")


@pytest.fixture
def random():
    return np.random.default_rng(0)


def wrapped_gaussian(random, samples, concentration):
    return random.vonmises(0.0, concentration, (samples, 2))


def test_ramachandran_divergence_of_known_densities(random):
    """Of von Mises distributions, summed over the two independent angles."""
    narrow, wide = 4.0, 1.0
    expected = wrapped_gaussian(random, 400_000, narrow)
    found = wrapped_gaussian(random, 400_000, wide)
    angles = np.linspace(-math.pi, math.pi, 20_001)[:-1]
    densities = [np.exp(k * np.cos(angles)) / np.i0(k) for k in (narrow, wide)]
    exact = 2.0 * (densities[0] * np.log(densities[0] / densities[1])).mean()
    value = molecules.ramachandran_divergence(expected, found)
    assert value == pytest.approx(exact, rel=0.03)
    # The weights that turn one into the other.
    weights = np.exp((narrow - wide) * np.cos(found).sum(-1))
    assert molecules.ramachandran_divergence(expected, found, weights) < 0.02 * exact


def test_angles_are_on_the_circle(random):
    angles = random.uniform(-3.0, 3.0, (500, 2))
    value = molecules.ramachandran_divergence(angles, angles, bins=8)
    turned = molecules.ramachandran_divergence(angles, angles + 2.0 * math.pi, bins=8)
    assert turned == pytest.approx(value)


def test_a_state_that_is_missed_is_costly_but_finite(random):
    expected = np.concatenate([np.zeros((500, 2)), np.full((500, 2), 2.0)])
    value = molecules.ramachandran_divergence(expected, expected[:500])
    assert 2.0 < value < 10.0


def test_energy_distance_of_gaussians(random):
    x = random.normal(0.0, 1.0, 50_000)
    y = random.normal(0.7, 2.0, 70_000)
    assert molecules.energy_distance(x, y) == pytest.approx(math.hypot(0.7, 1.0), rel=0.02)
    # Weights that turn y into x.
    weights = np.exp(-0.5 * y**2 + 0.5 * ((y - 0.7) / 2.0) ** 2)
    assert molecules.energy_distance(x, y, weights) < 0.05


def test_energy_distance_is_that_of_small_sets():
    x, y = np.array([0.0, 1.0]), np.array([4.0, 0.0, 2.0])
    # Quantiles on thirds and halves: (0, 0) 1/3, (0, 2) 1/6, (1, 2) 1/6, (1, 4) 1/3.
    expected = math.sqrt(0 / 3 + 4 / 6 + 1 / 6 + 9 / 3)
    assert molecules.energy_distance(x, y) == pytest.approx(expected)
    assert molecules.energy_distance(x, y, np.array([0.0, 1.0, 0.0])) == pytest.approx(
        math.sqrt(0.5)
    )


def test_torus_distance_goes_the_short_way_round():
    pytest.importorskip("ot", reason="needs POT, of the extra `molecules`")
    x = np.array([[3.0, 0.0], [0.0, 0.0]])
    y = np.array([[0.1, 0.0], [-3.0, 0.2]])
    short = 2.0 * math.pi - 6.0
    expected = math.sqrt(0.5 * (short**2 + 0.2**2) + 0.5 * 0.1**2)
    assert molecules.torus_distance(x, y) == pytest.approx(expected)
    weighted = molecules.torus_distance(x[1:], y, np.array([3.0, 0.0]))
    assert weighted == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["ramachandran_divergence", "torus_distance"])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3), r"weights must have shape \(4,\), got \(3,\)"),
        (-np.ones(4), "weights must not be negative or all zero"),
        (np.zeros(4), "weights must not be negative or all zero"),
    ],
)
def test_weights_that_do_not_suit_are_refused(name, weights, message):
    if name == "torus_distance":
        pytest.importorskip("ot", reason="needs POT, of the extra `molecules`")
    with pytest.raises(ValueError, match=message):
        getattr(molecules, name)(np.zeros((4, 2)), np.zeros((4, 2)), weights)


def test_shapes_that_do_not_suit_are_refused():
    with pytest.raises(ValueError, match=r"found must have shape \(samples, 2\), got \(4, 3\)"):
        molecules.ramachandran_divergence(np.zeros((4, 2)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"alike torsions, got \(4, 2\), \(4, 3\)"):
        molecules.torus_distance(np.zeros((4, 2)), np.zeros((4, 3)))
