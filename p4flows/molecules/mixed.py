"""MixedCoordinateTransform: whitened Cartesian block and internal coordinates (Appendix H)."""

import math
from collections.abc import Sequence

import mdtraj
import torch
from nflows.transforms.base import Transform
from openmm import app
from torch import Tensor

from p4flows.arguments import check_rows
from p4flows.molecules.internal import AtomPlacement, internal_coordinates, volume_element
from p4flows.molecules.whitening import WhitenedBlock
from p4flows.molecules.z_matrix import find_z_matrix


class MixedCoordinateTransform(Transform):
    """Cartesian coordinates of a molecule ↔ standardised mixed coordinates (Noé et al. 2019).

    A block of k atoms keeps Cartesian coordinates, superposed and whitened (`WhitenedBlock`); each
    other atom has a bond length, a bond angle and a torsion from a z-matrix (`find_z_matrix`). All
    are brought to mean 0 and variance 1 over the data; a torsion's circle is cut open first, where
    the data is sparsest. With 3k − 6 whitened coordinates, 3·atoms become 3·atoms − 6 features:
    the rigid motions are dropped, and the inverse puts the block's centre at the origin, in the
    orientation of the data's mean.

    The columns are [block, lengths, angles, torsions], each in the order of `z_matrix.rows`.

    **The log-determinant.** Dropping rigid motions makes this a map between spaces of different
    dimension, whose volume is defined by the full map (features q, translation t, rotation
    vector ω) → x = exp([ω]×) x(q) + t. `inverse` returns ln |det ∂x/∂(q, t, ω)| at t = ω = 0, and
    `forward` the same with its sign changed. A density that does not depend on position and
    orientation, as exp(−u(x)), has therefore the density exp(−u(x(q)) + logabsdet) of q, up to
    normalisation: weights of a Boltzmann generator need no further correction.

    Where it is not a bijection, results stay finite: a feature that stands for a torsion beyond the
    cut is a second image of the same structure, as is one for a length below zero or an angle
    outside of (0, π); collinear or coincident reference atoms give an arbitrary torsion, and
    logabsdet is bounded by the smallest number of the dtype.

    Args:
        data: frames in nm, shape `(frames, 3·atoms)`; it gives dtype and device.
        topology: an OpenMM or mdtraj topology with all bonds.
        block: the atoms that keep Cartesian coordinates, at least three and connected; by default
            as `find_z_matrix` chooses.

    Attributes:
        z_matrix: the `ZMatrix`.
        features: number of columns of the mixed coordinates, 3·atoms − 6.

    Raises:
        TypeError: when the data is not a floating-point tensor or the topology of another class.
        ValueError: when the data has another number of atoms or is not finite, three atoms that a
            torsion refers to are collinear in a frame, a coordinate never varies (constraints), or
            the block does not suit the molecule.

    Cost: forward and inverse O(N·atoms).

    Example:
        >>> from p4flows.molecules import alanine_dipeptide
        >>> molecule = alanine_dipeptide()
        >>> frames = torch.tensor(molecule.positions).flatten() + 0.005 * torch.randn(100, 66)
        >>> transform = MixedCoordinateTransform(frames, molecule.topology)
        >>> features, logabsdet = transform(frames)
        >>> features.shape, logabsdet.shape
        (torch.Size([100, 60]), torch.Size([100]))
        >>> positions, _ = transform.inverse(features)
        >>> torch.allclose(transform(positions)[0], features, atol=1e-2)
        True
    """

    rows: Tensor
    cuts: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        data: Tensor,
        topology: app.Topology | mdtraj.Topology,
        *,
        block: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.z_matrix = find_z_matrix(topology, block)
        self._block = list(self.z_matrix.block)
        self._atoms = len(self._block) + len(self.z_matrix.rows)
        self.features = 3 * self._atoms - 6
        check_rows(data, 3 * self._atoms)
        if not bool(data.isfinite().all()):
            raise ValueError("data must be finite, got NaN or infinite coordinates")

        rows = torch.tensor(self.z_matrix.rows, dtype=torch.int64).reshape(-1, 4)
        self.register_buffer("rows", rows)
        positions = data.detach().cpu().double().reshape(-1, self._atoms, 3)
        _refuse_collinear(positions, rows)
        self.whitening = WhitenedBlock(positions[:, self._block])
        self.placement = AtomPlacement(self.z_matrix)
        coordinates = internal_coordinates(positions, rows)
        self.register_buffer("cuts", _sparsest(coordinates[..., 2]))
        coordinates = self._open(coordinates)
        self.register_buffer("mean", coordinates.mean(0))
        self.register_buffer("deviation", coordinates.std(0))
        _refuse_constant(self.deviation, rows)
        self.to(data)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Positions → features.

        Args:
            inputs: positions in nm, anywhere and in any orientation, shape `(N, 3·atoms)`.
            context: accepted and ignored.

        Returns:
            Features of shape `(N, 3·atoms − 6)` and logabsdet of shape `(N,)`.

        Raises:
            TypeError: when the inputs are not a floating-point tensor.
            ValueError: when their shape is not `(N, 3·atoms)`.
        """
        check_rows(inputs, 3 * self._atoms)
        positions = inputs.reshape(-1, self._atoms, 3)
        whitened, logabsdet = self.whitening(positions[:, self._block])
        coordinates = internal_coordinates(positions, self.rows)
        volume = volume_element(coordinates) + self.deviation.log().sum()
        standard = (self._open(coordinates) - self.mean) / self.deviation
        features = torch.cat([whitened, standard.mT.flatten(1)], -1)
        return features, logabsdet - volume

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features → positions.

        Args:
            inputs: features, shape `(N, 3·atoms − 6)`.
            context: accepted and ignored.

        Returns:
            Positions in nm of shape `(N, 3·atoms)` and logabsdet of shape `(N,)`.

        Raises:
            TypeError: when the inputs are not a floating-point tensor.
            ValueError: when their shape is not `(N, 3·atoms − 6)`.
        """
        check_rows(inputs, self.features)
        internal = 3 * len(self.rows)
        whitened, standard = inputs.split([self.features - internal, internal], -1)
        block, logabsdet = self.whitening.inverse(whitened)
        coordinates = standard.reshape(len(inputs), 3, -1).mT * self.deviation + self.mean
        volume = volume_element(coordinates) + self.deviation.log().sum()
        return self.placement(block, coordinates).flatten(1), logabsdet + volume

    def _open(self, coordinates: Tensor) -> Tensor:
        """Torsions counted from their cut on, in [cut, cut + 2π)."""
        lengths_and_angles, torsions = coordinates.split([2, 1], -1)
        beyond = torch.remainder(torsions.squeeze(-1) - self.cuts, 2.0 * math.pi)
        return torch.cat([lengths_and_angles, (beyond + self.cuts).unsqueeze(-1)], -1)


_BINS = 72  # of 5°
_CONCENTRATION = 100.0  # a kernel of 6°
_MIN_SINE = 1e-3
# In nm or rad: a constraint solver leaves 1e-6 of it, a vibration at 1 K has 1e-4.
_RIGID = 1e-5


def _sparsest(torsions: Tensor) -> Tensor:
    """For each column, where on the circle a kernel density estimate is lowest.

    The kernel exp(κ cos) is positive all around, so that in an empty stretch the minimum lies
    where the data is farthest.
    """
    bins = ((torsions + math.pi) * (_BINS / (2.0 * math.pi))).long().remainder(_BINS)
    counts = torch.stack([torch.bincount(column, minlength=_BINS) for column in bins.T])
    centers = (torch.arange(_BINS, dtype=torsions.dtype) + 0.5) * (2.0 * math.pi / _BINS) - math.pi
    kernel = torch.exp(_CONCENTRATION * (torch.cos(centers - centers.unsqueeze(1)) - 1.0))
    return centers[(counts.to(kernel) @ kernel).argmin(-1)]


def _refuse_collinear(positions: Tensor, rows: Tensor) -> None:
    """An error when the three reference atoms of a torsion are collinear, or two coincide."""
    _, bond, angle, torsion = positions[:, rows].unbind(2)
    first, second = bond - angle, torsion - angle
    across = torch.linalg.cross(first, second).norm(dim=-1)
    sine = across / (first.norm(dim=-1) * second.norm(dim=-1)).clamp_min(1e-30)
    bad = (sine < _MIN_SINE).nonzero()
    if len(bad):
        frame, row = bad[0].tolist()
        raise ValueError(
            f"the reference atoms {rows[row, 1:].tolist()} of atom {rows[row, 0]} must not be "
            f"collinear or coincide, as in frame {frame}"
        )


def _refuse_constant(deviation: Tensor, rows: Tensor) -> None:
    """An error when a coordinate does not vary over the data."""
    constant = (~(deviation > _RIGID)).nonzero()
    if len(constant):
        row, kind = constant[0].tolist()
        name = ("bond length", "bond angle", "torsion")[kind]
        raise ValueError(
            f"every coordinate must vary over the data, got a constant {name} of atom "
            f"{rows[row, 0]} (constraints, or too few frames)"
        )
