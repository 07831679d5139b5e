"""Weights and what is said of them, where it is known exactly."""

import math

import numpy as np
import pytest
import torch
from nflows.flows.base import Flow
from nflows.transforms.standard import PointwiseAffineTransform

from p4flows.flows.base import BaseNormal

molecules = pytest.importorskip("p4flows.molecules", reason="needs the extra `molecules`")
reweighting = pytest.importorskip("p4flows.molecules.reweighting")

WIDER = 1.5


def gaussian_flow(features, width):
    scale = torch.full((features,), 1.0 / width, dtype=torch.float64)
    return Flow(PointwiseAffineTransform(scale=scale), BaseNormal(features)).double()


@pytest.fixture(scope="module")
def generator():
    """(flow, coordinates, energy): a Gaussian of width WIDER for a standard one, two dimensions."""
    coordinates = PointwiseAffineTransform(scale=torch.tensor([2.0, 2.0])).double()
    return gaussian_flow(2, 2.0 * WIDER), coordinates, lambda x: 0.5 * x.square().sum(-1)


# (Σw)²/(n Σw²) of two Gaussians of widths 1 and s is (2 − 1/s²)/s²·... for each dimension:
# E[w²] = s²/√(2s² − 1) with E[w] = 1.
EXACT = (math.sqrt(2.0 * WIDER**2 - 1.0) / WIDER**2) ** 2


def test_effective_sample_sizes_of_two_gaussians(generator):
    torch.manual_seed(0)
    found = molecules.weighted_samples(*generator, 40_000)
    assert found.features.shape == found.positions.shape == (40_000, 2)
    assert molecules.effective_sample_size(found.log_weights) == pytest.approx(EXACT, rel=0.02)
    frames = torch.randn(40_000, 2, dtype=torch.float64)
    forward = molecules.log_weights_of(*generator, frames)
    assert molecules.forward_effective_sample_size(forward) == pytest.approx(EXACT, rel=0.03)


def test_weights_of_frames_are_those_of_samples(generator):
    torch.manual_seed(0)
    found = molecules.weighted_samples(*generator, 20)
    again = molecules.log_weights_of(*generator, found.positions)
    torch.testing.assert_close(again, found.log_weights)


def test_forward_size_sees_what_the_samples_miss():
    """A generator of one of two equal states: its own samples do not know of the other."""
    torch.manual_seed(0)
    assert molecules.effective_sample_size(torch.zeros(1000)) == pytest.approx(1.0)
    frames = torch.zeros(1000)
    frames[::2] = 20.0
    assert molecules.forward_effective_sample_size(frames) < 1e-6


def test_kl_divergences_of_two_gaussians(generator):
    torch.manual_seed(0)
    found = molecules.weighted_samples(*generator, 40_000).log_weights
    found[0] = -math.inf
    frames = molecules.log_weights_of(*generator, torch.randn(40_000, 2, dtype=torch.float64))
    reverse, forward = reweighting.kl_divergences(found, frames)
    assert reverse == pytest.approx(WIDER**2 - 1.0 - 2.0 * math.log(WIDER), abs=0.02)
    assert forward == pytest.approx(WIDER**-2 - 1.0 + 2.0 * math.log(WIDER), abs=0.02)


def test_clipping_sets_the_largest_to_the_next():
    log_weights = torch.randn(20_000)
    log_weights[[3, 7]] = torch.tensor([100.0, 200.0])
    cut = reweighting.clipped(log_weights)
    assert cut[3] == cut[7] == log_weights.sort().values[-3] == cut.max()
    rest = torch.ones(20_000, dtype=torch.bool)
    rest[[3, 7]] = False
    assert torch.equal(cut[rest], log_weights[rest])
    assert molecules.effective_sample_size(log_weights) < 1e-4
    assert molecules.effective_sample_size(log_weights, clip=1e-4) > 0.2
    assert torch.equal(reweighting.clipped(log_weights, 0.0), log_weights)


def test_what_is_not_covered_weighs_nothing(generator):
    flow, coordinates, energy = generator

    class Half(PointwiseAffineTransform):
        def covers(self, features):
            return features[:, 0] > 0

    half = Half(scale=torch.tensor([2.0, 2.0])).double()
    torch.manual_seed(0)
    found = molecules.weighted_samples(flow, half, energy, 12_000)
    torch.manual_seed(0)
    all_of_it = molecules.weighted_samples(flow, coordinates, energy, 12_000)
    inside = found.features[:, 0] > 0
    assert torch.equal(found.log_weights[inside], all_of_it.log_weights[inside])
    assert (found.log_weights[~inside] == -math.inf).all() and 0.4 < inside.double().mean() < 0.6


def test_infinite_and_undefined_energies_weigh_nothing(generator):
    flow, coordinates, _ = generator
    values = torch.tensor([0.0, math.inf, math.nan, 1.0], dtype=torch.float64)
    found = molecules.weighted_samples(flow, coordinates, lambda x: values, 4)
    assert found.log_weights.isfinite().tolist() == [True, False, False, True]
    assert not found.log_weights.isnan().any()


def test_bootstrap_error_is_that_of_a_mean():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2_000, generator=generator)
    error = reweighting.bootstrap_error(
        lambda a, b: (a.mean() + 0.0 * b.mean()).item(), x, x, resamples=400, generator=generator
    )
    assert error == pytest.approx(x.std().item() / math.sqrt(2_000), rel=0.15)


def test_numpy_weights_do_as_well():
    weights = np.log(np.array([0.5, 0.25, 0.25]))
    assert molecules.effective_sample_size(weights) == pytest.approx(1.0 / 3.0 / 0.375)
    first = np.array([True, False, False])
    assert molecules.free_energy_difference(weights, first, ~first) == pytest.approx(0.0)


def test_no_weight_at_all_is_a_size_of_zero():
    assert molecules.effective_sample_size(torch.full((5,), -math.inf)) == 0.0


def test_resampled_rows_come_as_often_as_they_weigh():
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.tensor([0.0, math.log(3.0), -math.inf]).repeat(10_000) + 1_000.0
    rows = reweighting.resampled(
        torch.arange(3).repeat(10_000), log_weights, clip=0.0, generator=generator
    )
    counts = torch.bincount(rows, minlength=3) / len(rows)
    torch.testing.assert_close(counts, torch.tensor([0.25, 0.75, 0.0]), rtol=0, atol=0.02)
    # Clipped, a single huge weight does not take all.
    log_weights[0] += 50.0
    clip = reweighting.resampled(torch.arange(30_000), log_weights, generator=generator)
    assert (clip == 0).sum() < 30
    with pytest.raises(ValueError, match="no sample has a weight"):
        reweighting.resampled(torch.zeros(3), torch.full((3,), -math.inf))
