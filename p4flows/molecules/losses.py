"""Energy-based training of Boltzmann generators (paper, Appendix E)."""

from collections.abc import Callable

import torch
from nflows.flows.base import Flow
from nflows.transforms.base import Transform
from torch import Tensor

Energy = Callable[[Tensor], Tensor]


def _capped(energies: Tensor, cap: tuple[float, float] | None) -> Tensor:
    """Energies with a cap as in `mixed_loss` (Noé et al. 2019)."""
    if cap is None:
        return energies
    high, highest = cap
    excess = (energies.clamp(max=highest) - high).clamp_min(0.0)
    return torch.where(energies > high, high + torch.log1p(excess), energies)


def energy_loss(
    flow: Flow,
    coordinates: Transform,
    energy: Energy,
    samples: int,
    *,
    cap: tuple[float, float] | None = None,
) -> Tensor:
    """J_e = E_z[u(F_zx(z)) − ln R_zx(z)], the reverse KL divergence up to a constant (equation 6).

    Args:
        flow: an nflows `Flow` of the coordinates' features, data → noise in the forward direction.
        coordinates: positions → features, as `MixedCoordinateTransform`.
        energy: positions → reduced energies, as `OpenMMEnergy`.
        samples: number of noise vectors z.
        cap: as in `mixed_loss`.

    Returns:
        A differentiable scalar.

    Example:
        >>> from p4flows import P4InvTransform, realnvp_flow
        >>> coordinates = P4InvTransform(4)
        >>> energy_loss(realnvp_flow(4, 1), coordinates, lambda x: x.square().sum(-1), 10).shape
        torch.Size([])
    """
    noise = flow._distribution.sample(samples)
    # nflows has no public way to the log-determinant of the inverse.
    features, flow_volume = flow._transform.inverse(noise)
    positions, volume = coordinates.inverse(features)
    return (_capped(energy(positions), cap) - volume - flow_volume).mean()


def mixed_loss(
    coordinates: Transform,
    energy: Energy,
    *,
    ratio: float = 0.05,
    cap: tuple[float, float] | None = None,
) -> Callable[[Flow, Tensor], Tensor]:
    """The loss J = w_l J_l + w_e J_e of equation 6, as a loss of (flow, batch).

    Args:
        coordinates: positions → features, as `MixedCoordinateTransform`.
        energy: positions → reduced energies, as `OpenMMEnergy`.
        ratio: w_e/w_l, where w_l + w_e = 1; 0.05 in Appendix H.
        cap: (high, highest) in k_BT, or None. Above `high`, u is high + ln(1 + u − high); above
            `highest` it is constant, as it is where u is infinite: samples of an untrained flow
            have energies of 10²⁰ k_BT.

    Returns:
        A function of (flow, batch of features) that draws as many noise vectors as the batch has
        rows.

    Raises:
        ValueError: when the ratio is negative, or the cap not a pair with low < high.

    Example:
        >>> loss = mixed_loss(coordinates=None, energy=None, ratio=-1.0)
        Traceback (most recent call last):
        ...
        ValueError: ratio must not be negative, got -1.0
    """
    if ratio < 0:
        raise ValueError(f"ratio must not be negative, got {ratio}")
    if cap is not None and not cap[0] < cap[1]:
        raise ValueError(f"cap must have low < high, got {cap}")
    weight = ratio / (1.0 + ratio)

    def loss(flow: Flow, batch: Tensor) -> Tensor:
        likelihood = -flow.log_prob(batch).mean()
        reverse = energy_loss(flow, coordinates, energy, len(batch), cap=cap)
        return (1.0 - weight) * likelihood + weight * reverse

    return loss
