"""Energy-based training of Boltzmann generators (paper, Appendix E)."""

from collections.abc import Callable

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

    Example:
        >>> from p4flows import P4InvTransform, realnvp_flow
        >>> coordinates = P4InvTransform(4)
        >>> energy_loss(realnvp_flow(4, 1), coordinates, lambda x: x.square().sum(-1), 10).shape
        torch.Size([])
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
