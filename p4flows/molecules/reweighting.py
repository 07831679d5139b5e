"""Reweighting of Boltzmann generators: weights, effective sample sizes, free energies, errors."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from nflows.flows.base import Flow
from nflows.transforms.base import Transform
from torch import Tensor

from p4flows.arguments import check_positive_int
from p4flows.molecules.losses import Energy

# Rows at once: the spline parameters of 10,000 rows take some hundred MB.
ROWS = 5_000


class WeightedSamples(NamedTuple):
    """Structures of a Boltzmann generator with what makes their averages exact.

    Attributes:
        features: shape `(samples, features)`.
        positions: in nm, shape `(samples, 3·atoms)`.
        energies: reduced energies u, shape `(samples,)`.
        log_weights: −u + ln R_zx − ln p_z up to a constant, shape `(samples,)`; −∞ where the energy
            is infinite or the features are not covered by the coordinates.
    """

    features: Tensor
    positions: Tensor
    energies: Tensor
    log_weights: Tensor


@torch.no_grad()
def weighted_samples(
    flow: Flow, coordinates: Transform, energy: Energy, samples: int
) -> WeightedSamples:
    """Draw from a Boltzmann generator, in batches that fit into memory.

    Args:
        flow: an nflows `Flow` of the coordinates' features.
        coordinates: positions → features, as `MixedCoordinateTransform`; where it has `covers`,
            features that it does not cover get a weight of zero, and where it has `unfold`,
            equivalent atoms come in any order.
        energy: positions → reduced energies, as `OpenMMEnergy` without a cap.
        samples: number of structures.

    Returns:
        `WeightedSamples`.

    Raises:
        TypeError: when samples is not an int.
        ValueError: when samples is not positive.

    Example:
        >>> from p4flows import P4InvTransform, realnvp_flow
        >>> found = weighted_samples(
        ...     realnvp_flow(4, 1), P4InvTransform(4), lambda x: x.square().sum(-1), 10
        ... )
        >>> found.features.shape, found.log_weights.shape
        (torch.Size([10, 4]), torch.Size([10]))
    """
    check_positive_int("samples", samples)
    covers = getattr(coordinates, "covers", None)
    parts = []
    for first in range(0, samples, ROWS):
        features, log_density = flow.sample_and_log_prob(min(ROWS, samples - first))
        positions, volume = coordinates.inverse(features)
        # Weights are exact also where a force field tells equivalent atoms apart.
        if hasattr(coordinates, "unfold"):
            positions = coordinates.unfold(positions)
        energies = energy(positions)
        log_weights = volume - energies - log_density
        possible = ~log_weights.isnan()
        if covers is not None:
            possible &= covers(features)
        log_weights = torch.where(possible, log_weights, -math.inf)
        parts.append(WeightedSamples(features, positions, energies, log_weights))
    return WeightedSamples(*map(torch.cat, zip(*parts, strict=True)))


def sample_with_weights(
    flow: Flow, coordinates: Transform, energy: Energy, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, energies and log-weights of `weighted_samples`, whose arguments it takes."""
    return weighted_samples(flow, coordinates, energy, samples)[1:]


@torch.no_grad()
def log_weights_of(flow: Flow, coordinates: Transform, energy: Energy, positions: Tensor) -> Tensor:
    """Log-weights of given structures, the frames of a simulation for instance.

    Args:
        flow: an nflows `Flow` of the coordinates' features.
        coordinates: positions → features.
        energy: positions → reduced energies.
        positions: in nm, shape `(frames, 3·atoms)`.

    Returns:
        −u + ln R_zx − ln p_z, with the constant of `weighted_samples`, shape `(frames,)`.

    Example:
        >>> from p4flows import P4InvTransform, realnvp_flow
        >>> x = torch.randn(5, 4)
        >>> flow, energy = realnvp_flow(4, 1), lambda x: x.square().sum(-1)
        >>> log_weights_of(flow, P4InvTransform(4), energy, x).shape
        torch.Size([5])
    """
    parts = []
    for rows in positions.split(ROWS):
        folded = coordinates.fold(rows) if hasattr(coordinates, "fold") else rows
        features, shrinking = coordinates(folded)
        parts.append(-energy(rows) - flow.log_prob(features) - shrinking)
    return torch.cat(parts)


def clipped(log_weights: Tensor, share: float = 1e-4) -> Tensor:
    """The largest share of weights, at least one, set to the largest of the others."""
    count = max(1, int(share * len(log_weights))) if share else 0
    if count == 0 or count >= len(log_weights):
        return log_weights
    highest_left = log_weights.topk(count + 1).values[-1]
    return log_weights.clamp(max=highest_left)


def resampled(
    samples: Tensor,
    log_weights: Tensor,
    *,
    clip: float = 1e-4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """As many rows drawn with their weights, clipped: samples of the target, to train on."""
    if not bool(log_weights.isfinite().any()):
        raise ValueError("no sample has a weight: more frames and minutes are needed")
    weights = torch.softmax(clipped(log_weights.double(), clip), 0)
    rows = torch.multinomial(weights, len(weights), replacement=True, generator=generator)
    return samples[rows]


def effective_sample_size(log_weights: Tensor | np.ndarray, *, clip: float = 0.0) -> float:
    """Kish's (Σw)²/Σw² as a share of the samples.

    Args:
        log_weights: of samples of the generator, shape `(samples,)`; −∞ is a weight of zero.
        clip: share of the largest weights that is `clipped`; 1e-4 in the literature since Midgley
            et al. (2023).

    Returns:
        From 1/samples to 1, and 0 where all weights are zero. It is an upper estimate where the
        samples miss a part of the target.

    Example:
        >>> round(effective_sample_size(torch.zeros(10)), 6)
        1.0
    """
    wide = clipped(torch.as_tensor(log_weights).double(), clip)
    if not bool(wide.isfinite().any()):
        return 0.0
    log_size = 2.0 * torch.logsumexp(wide, 0) - torch.logsumexp(2.0 * wide, 0)
    return (log_size.exp() / len(wide)).item()


def forward_effective_sample_size(log_weights: Tensor) -> float:
    """The effective sample size as frames of the target see it, 1/(E_p[w]·E_p[1/w]).

    The same number as `effective_sample_size` for a generator that covers the target; where it
    misses a part, w is large there and this one falls.

    Args:
        log_weights: of independent structures of the target (`log_weights_of`), shape `(frames,)`.

    Returns:
        From 0 to 1.

    Example:
        >>> round(forward_effective_sample_size(torch.zeros(10)), 6)
        1.0
    """
    wide = log_weights.double()
    log_size = 2.0 * math.log(len(wide)) - torch.logsumexp(wide, 0) - torch.logsumexp(-wide, 0)
    return log_size.exp().item()


def kl_divergences(log_weights: Tensor, frame_log_weights: Tensor) -> tuple[float, float]:
    """KL(q‖p) and KL(p‖q) in nats, from weights of samples and of frames of the target.

    E_q[ln w] ≤ ln Z ≤ E_p[ln w] with Z = E_q[w]; the gaps are the two, and the second is the
    negative log-likelihood less the entropy of the target.
    """
    wide = log_weights.double()
    log_z = torch.logsumexp(wide, 0) - math.log(len(wide))
    reverse = log_z - wide[wide.isfinite()].mean()
    return reverse.item(), (frame_log_weights.double().mean() - log_z).item()


def free_energy_difference(
    log_weights: Tensor | np.ndarray, first: Tensor | np.ndarray, second: Tensor | np.ndarray
) -> float:
    """F(second) − F(first) in k_BT from weighted samples.

    Args:
        log_weights: shape `(samples,)`; zeros for samples of the Boltzmann distribution itself.
        first: boolean mask of the samples in the first state.
        second: boolean mask of those in the second state.

    Returns:
        −ln of the ratio of the states' weights; infinite when one has none.

    Example:
        >>> masks = torch.tensor([True, True, False]), torch.tensor([False, False, True])
        >>> round(free_energy_difference(torch.zeros(3), *masks), 4)
        0.6931
    """
    wide, first, second = map(torch.as_tensor, (log_weights, first, second))
    wide = wide.double()
    return (torch.logsumexp(wide[first], 0) - torch.logsumexp(wide[second], 0)).item()


def bootstrap_error(
    statistic: Callable[..., float],
    *samples: Tensor,
    resamples: int = 100,
    generator: torch.Generator | None = None,
) -> float:
    """Standard error of a statistic of rows that are independent, by drawing them again."""
    found = []
    for _ in range(resamples):
        rows = torch.randint(len(samples[0]), (len(samples[0]),), generator=generator)
        found.append(statistic(*(tensor[rows] for tensor in samples)))
    return torch.tensor(found, dtype=torch.float64).std().item()
