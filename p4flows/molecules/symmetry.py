"""Atoms that can change places without a change of energy: the hydrogens of methyl groups."""

import itertools
import math

import mdtraj
import torch
from nflows.flows.base import Flow
from nflows.transforms.base import Transform
from openmm import app
from torch import Tensor

from p4flows.arguments import check_rows
from p4flows.molecules.bonds import bonded, openmm_topology

# Rows at once: the spline parameters of 10,000 rows take some hundred MB.
ROWS = 5_000


def methyl_rotations(topology: app.Topology | mdtraj.Topology) -> Tensor:
    """All turns of methyl groups by a third, as permutations of the atoms.

    Three hydrogens at one atom with four neighbours (methyl, ammonium) can be exchanged in a cycle
    by a turn of the group; any two of them alone would mirror it. With m such groups there are 3^m
    combinations, 27 for alanine dipeptide; the first 3^k are those of the last k groups alone.

    Args:
        topology: an OpenMM or mdtraj topology with all bonds.

    Returns:
        An int64 tensor of shape `(3^m, atoms)`, the identity first: a structure `x` of shape
        `(atoms, 3)` becomes `x[permutation]`. It is a group.

    Raises:
        TypeError: when the topology is of another class.

    Example:
        >>> from p4flows.molecules import alanine_dipeptide
        >>> methyl_rotations(alanine_dipeptide().topology).shape
        torch.Size([27, 22])
    """
    topology = openmm_topology(topology)
    hydrogens = {a.index for a in topology.atoms() if a.element is app.element.hydrogen}
    neighbours = bonded(topology)
    groups = [
        sorted(found & hydrogens)
        for found in neighbours
        if len(found) == 4 and len(found & hydrogens) == 3
    ]
    identity = torch.arange(len(neighbours))
    permutations = identity.repeat(3 ** len(groups), 1)
    for row, turns in enumerate(itertools.product(range(3), repeat=len(groups))):
        for group, turn in zip(groups, turns, strict=True):
            permutations[row, group] = identity[group].roll(turn)
    return permutations


def check_symmetries(symmetries: Tensor, atoms: int) -> None:
    """An error when something is not a group of permutations of the atoms.

    Args:
        symmetries: shape `(g, atoms)`.
        atoms: their number.

    Raises:
        TypeError: when it is not an integer tensor.
        ValueError: when its shape is another, a row is no permutation, or two of them give one that
            is missing.
    """
    if not isinstance(symmetries, Tensor) or symmetries.dtype != torch.int64:
        raise TypeError(
            "symmetries must be an int64 tensor, got "
            f"{getattr(symmetries, 'dtype', type(symmetries).__name__)}"
        )
    if symmetries.ndim != 2 or symmetries.shape[1] != atoms or not len(symmetries):
        raise ValueError(
            f"symmetries must have shape (g, {atoms}) with g > 0, got {tuple(symmetries.shape)}"
        )
    symmetries = symmetries.cpu()
    if not torch.equal(symmetries.sort(-1).values, torch.arange(atoms).expand_as(symmetries)):
        raise ValueError(f"every row of symmetries must be a permutation of 0 to {atoms - 1}")
    # Of 3⁶ permutations there are half a million products: compared by one number each.
    places = torch.randint(2**40, (atoms,), generator=torch.Generator().manual_seed(0))
    products = (symmetries[:, symmetries] * places).sum(-1)
    if not torch.isin(products, (symmetries * places).sum(-1)).all():
        raise ValueError("symmetries must be a group: the product of two of its rows is missing")


def permuted(
    positions: Tensor, symmetries: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Each structure with its atoms in one of the equivalent orders, drawn at random.

    More data from the same data: to be done anew for each batch.

    Args:
        positions: shape `(N, 3·atoms)`, on any device.
        symmetries: int64, shape `(g, atoms)`, as `methyl_rotations` gives them.
        generator: of the draws; torch's global one by default.

    Returns:
        Positions of the same shape.

    Raises:
        TypeError: when positions are not a floating-point tensor.
        ValueError: when the shapes do not fit.

    Example:
        >>> positions = torch.arange(6.0).reshape(1, 6)
        >>> permuted(positions, torch.tensor([[1, 0]])).tolist()
        [[3.0, 4.0, 5.0, 0.0, 1.0, 2.0]]
    """
    check_rows(positions, 3 * symmetries.shape[-1])
    device = torch.device("cpu") if generator is None else generator.device
    count = (len(positions),)
    chosen = torch.randint(len(symmetries), count, generator=generator, device=device)
    orders = symmetries[chosen.to(symmetries.device)].to(positions.device)
    atoms = orders.unsqueeze(-1).expand(-1, -1, 3)
    return positions.unflatten(-1, (-1, 3)).gather(1, atoms).flatten(1)


@torch.no_grad()
def log_density_of(
    flow: Flow, coordinates: Transform, positions: Tensor, symmetries: Tensor | None = None
) -> Tensor:
    """Log-density of structures under a Boltzmann generator.

    With `symmetries` it is that of the flow whose samples' atoms are then put in one of the
    equivalent orders at random, the mean of q over all orders: what the flow has learnt of one
    order but not of another averages out. By convexity no divergence of the mean from a density
    with these symmetries is larger than that of q, and its effective sample size is no smaller.

    Args:
        flow: an nflows `Flow` of the coordinates' features.
        coordinates: positions → features, as `MixedCoordinateTransform`; where it has `covers`,
            other orders whose features it does not cover have density zero.
        positions: in nm, shape `(N, 3·atoms)`.
        symmetries: a group of permutations, int64, shape `(g, atoms)`.

    Returns:
        ln q in the coordinates' volume, shape `(N,)`.

    Raises:
        TypeError: when symmetries are not an int64 tensor.
        ValueError: when they are not a group of permutations of the atoms.

    Cost: g times that of the flow's `log_prob`.

    Example:
        >>> from p4flows import P4InvTransform, realnvp_flow
        >>> flow, x = realnvp_flow(6, 1), torch.randn(5, 6)
        >>> exchanges = torch.tensor([[0, 1], [1, 0]])
        >>> found = log_density_of(flow, P4InvTransform(6), x, exchanges)
        >>> twin = x.reshape(5, 2, 3).flip(1).flatten(1)
        >>> torch.allclose(found, log_density_of(flow, P4InvTransform(6), twin, exchanges))
        True
    """
    covers = getattr(coordinates, "covers", None)
    orders: list[Tensor | None] = [None]
    if symmetries is not None:
        check_symmetries(symmetries, positions.shape[-1] // 3)
        own = torch.arange(symmetries.shape[1])
        orders = [None if torch.equal(order, own) else order for order in symmetries.cpu()]
    parts = []
    for rows in positions.split(ROWS):
        found = []
        for order in orders:
            images = rows if order is None else rows.unflatten(-1, (-1, 3))[:, order].flatten(1)
            features, shrinking = coordinates(images)
            density = flow.log_prob(features) + shrinking
            if covers is not None and order is not None:
                density = torch.where(covers(features), density, -math.inf)
            found.append(density)
        parts.append(torch.logsumexp(torch.stack(found), 0) - math.log(len(found)))
    return torch.cat(parts)
