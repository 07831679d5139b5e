"""Training and reweighting of Boltzmann generators (paper, Appendix E)."""

from collections.abc import Callable

import torch
from nflows.flows.base import Flow
from nflows.transforms.base import Transform
from torch import Tensor

Energy = Callable[[Tensor], Tensor]


def energy_loss(flow: Flow, coordinates: Transform, energy: Energy, samples: int) -> Tensor:
    """J_e = E_z[u(F_zx(z)) − ln R_zx(z)], the reverse KL divergence up to a constant (equation 6).

    Args:
        flow: an nflows `Flow` of the coordinates' features, data → noise in the forward direction.
        coordinates: positions → features, as `MixedCoordinateTransform`.
        energy: positions → reduced energies, as `OpenMMEnergy` with a cap.
        samples: number of noise vectors z.

    Returns:
        A differentiable scalar.
    """
    noise = flow._distribution.sample(samples)
    features, flow_volume = flow._transform.inverse(noise)
    positions, volume = coordinates.inverse(features)
    return (energy(positions) - volume - flow_volume).mean()


def mixed_loss(
    coordinates: Transform, energy: Energy, *, ratio: float = 0.05
) -> Callable[[Flow, Tensor], Tensor]:
    """The loss J = w_l J_l + w_e J_e of equation 6, for `fit(loss=...)`.

    Args:
        coordinates: positions → features, as `MixedCoordinateTransform`.
        energy: positions → reduced energies, as `OpenMMEnergy` with a cap.
        ratio: w_e/w_l, where w_l + w_e = 1; 0.05 in Appendix H.

    Returns:
        A function of (flow, batch of features) that draws as many noise vectors as the batch has
        rows.

    Raises:
        ValueError: when the ratio is negative.

    Example:
        >>> loss = mixed_loss(coordinates=None, energy=None, ratio=-1.0)
        Traceback (most recent call last):
        ...
        ValueError: ratio must not be negative, got -1.0
    """
    if ratio < 0:
        raise ValueError(f"ratio must not be negative, got {ratio}")
    weight = ratio / (1.0 + ratio)

    def loss(flow: Flow, batch: Tensor) -> Tensor:
        likelihood = -flow.log_prob(batch).mean()
        reverse = energy_loss(flow, coordinates, energy, len(batch))
        return (1.0 - weight) * likelihood + weight * reverse

    return loss


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
