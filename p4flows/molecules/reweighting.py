"""Reweighting of Boltzmann generators: weights, effective sample size, free energies."""

import torch
from nflows.flows.base import Flow
from nflows.transforms.base import Transform
from torch import Tensor

from p4flows.molecules.losses import Energy


@torch.no_grad()
def sample_with_weights(
    flow: Flow, coordinates: Transform, energy: Energy, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Structures from a Boltzmann generator with the weights that make averages exact.

    Args:
        flow: an nflows `Flow` of the coordinates' features.
        coordinates: positions → features, as `MixedCoordinateTransform`.
        energy: positions → reduced energies, as `OpenMMEnergy` without a cap.
        samples: number of structures.

    Returns:
        Positions of shape `(samples, 3·atoms)`, reduced energies u and log-weights
        −u + ln R_zx − ln p_z up to a constant, both of shape `(samples,)`.

    Example:
        >>> from p4flows import P4InvTransform, realnvp_flow
        >>> positions, energies, log_weights = sample_with_weights(
        ...     realnvp_flow(4, 1), P4InvTransform(4), lambda x: x.square().sum(-1), 10
        ... )
        >>> positions.shape, log_weights.shape
        (torch.Size([10, 4]), torch.Size([10]))
    """
    features, log_density = flow.sample_and_log_prob(samples)
    positions, volume = coordinates.inverse(features)
    energies = energy(positions)
    return positions, energies, volume - energies - log_density


def effective_sample_size(log_weights: Tensor) -> float:
    """Kish's (Σw)²/Σw² as a share of the samples.

    Args:
        log_weights: shape `(samples,)`; −∞ is a weight of zero.

    Returns:
        From 1/samples to 1.

    Example:
        >>> round(effective_sample_size(torch.zeros(10)), 6)
        1.0
    """
    wide = log_weights.double()
    log_size = 2.0 * torch.logsumexp(wide, 0) - torch.logsumexp(2.0 * wide, 0)
    return (log_size.exp() / len(wide)).item()


def free_energy_difference(log_weights: Tensor, first: Tensor, second: Tensor) -> float:
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
    wide = log_weights.double()
    return (torch.logsumexp(wide[first], 0) - torch.logsumexp(wide[second], 0)).item()
