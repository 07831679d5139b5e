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
from p4flows.molecules.whitening import RIGID, WhitenedBlock
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

    **Circles.** A torsion that turns freely has data on both sides of any cut, and a flow on the
    line leaks across it. With `circular=True` every torsion whose density at its cut is more than
    1 % of its highest stays an angle in [−π, π), in radians and not standardised; the columns are
    those of `circular`, for a flow on R^p × T^q (`spline_flow(..., circular=...)`).

    **Labels and hands.** Hydrogens of a methyl group can be exchanged and a chiral centre mirrored
    without a change of energy, but no simulation does so. A torsion relative to a sibling whose
    data stays on one side of the plane is kept there, half of its circle (as Schopmans and
    Friederich 2025 do), and a block keeps its hand. Nothing is clamped: `covers` tells which
    features lie within, and samples outside of it are to have weight zero. A third of a turn of a
    methyl group (`methyl_rotations`) stays within.

    **The log-determinant.** Dropping rigid motions makes this a map between spaces of different
    dimension, whose volume is defined by the full map (features q, translation t, rotation
    vector ω) → x = exp([ω]×) x(q) + t. `inverse` returns `ln|det ∂x/∂(q, t, ω)|` at t = ω = 0, and
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
        circular: whether torsions that the data shows to turn freely stay on the circle.

    Attributes:
        z_matrix: the `ZMatrix`.
        features: number of columns of the mixed coordinates, 3·atoms − 6.
        circular: the columns that are angles in [−π, π), in ascending order; the others are
            Euclidean.

    Raises:
        TypeError: when the data is not a floating-point tensor, the topology of another class or
            circular not a bool.
        ValueError: when the data has another number of atoms or is not finite, three atoms that a
            torsion refers to are collinear in a frame, a coordinate never varies (constraints),
            the block does not suit the molecule, or with `circular=True` a ring is not all of it
            in the block.

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
    on_circle: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(
        self,
        data: Tensor,
        topology: app.Topology | mdtraj.Topology,
        *,
        block: Sequence[int] | None = None,
        circular: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(circular, bool):
            raise TypeError(f"circular must be a bool, got {type(circular).__name__}")
        self.z_matrix = find_z_matrix(topology, block)
        self._block = list(self.z_matrix.block)
        self._atoms = len(self._block) + len(self.z_matrix.rows)
        self.features = 3 * self._atoms - 6
        check_rows(data, 3 * self._atoms)
        if not bool(data.isfinite().all()):
            raise ValueError("data must be finite, got NaN or infinite coordinates")

        if circular:
            _refuse_open_rings(topology, self._block, self.z_matrix.rows)
        rows = torch.tensor(self.z_matrix.rows, dtype=torch.int64).reshape(-1, 4)
        self.register_buffer("rows", rows)
        positions = data.detach().cpu().double().reshape(-1, self._atoms, 3)
        _refuse_collinear(positions, rows)
        self.whitening = WhitenedBlock(positions[:, self._block])
        self.placement = AtomPlacement(self.z_matrix)
        coordinates = internal_coordinates(positions, rows)
        cuts, filling = _sparsest(coordinates[..., 2])
        self.register_buffer("cuts", cuts)
        self.register_buffer("on_circle", (filling > _FILLED) & circular)
        coordinates = self._open(coordinates)
        mean, deviation = coordinates.mean(0), coordinates.std(0)
        _refuse_constant(deviation, rows)
        mean[:, 2] = torch.where(self.on_circle, cuts + math.pi, mean[:, 2])
        deviation[:, 2] = torch.where(self.on_circle, 1.0, deviation[:, 2])
        lowest, highest = _ranges(coordinates, cuts, _beside_sibling(topology, rows))
        for name, value in (
            ("mean", mean),
            ("deviation", deviation),
            ("lowest", lowest),
            ("highest", highest),
        ):
            self.register_buffer(name, value)
        self.to(data)

    @property
    def circular(self) -> tuple[int, ...]:
        """The columns that are angles in [−π, π)."""
        first = self.features - len(self.rows)
        return tuple(first + row for row in self.on_circle.nonzero().flatten().tolist())

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
        whitened, coordinates = self._split(inputs)
        block, logabsdet = self.whitening.inverse(whitened)
        volume = volume_element(coordinates) + self.deviation.log().sum()
        return self.placement(block, coordinates).flatten(1), logabsdet + volume

    def covers(self, inputs: Tensor) -> Tensor:
        """Which features stand for a structure of their own, of the data's labels and hand.

        Args:
            inputs: features, shape `(N, 3·atoms − 6)`.

        Returns:
            A bool tensor of shape `(N,)`, False where a length, an angle or a torsion is outside of
            its range, a circular feature outside of [−π, π), or the block is mirrored.

        Raises:
            TypeError: when the inputs are not a floating-point tensor.
            ValueError: when their shape is not `(N, 3·atoms − 6)`.
        """
        check_rows(inputs, self.features)
        block, coordinates = self._split(inputs)
        inside = ((coordinates >= self.lowest) & (coordinates <= self.highest)).flatten(1).all(-1)
        return inside & self.whitening.keeps_hand(block)

    def one_sided(self) -> tuple[tuple[int, int, int, int], ...]:
        """The rows of the z-matrix whose torsion is kept on one side of the plane."""
        halved = (self.highest - self.lowest)[:, 2] < 1.5 * math.pi
        return tuple(row for row, half in zip(self.z_matrix.rows, halved, strict=True) if half)

    def extra_repr(self) -> str:
        """Which columns are what."""
        rows, first = len(self.rows), self.features - 3 * len(self.rows)
        return (
            f"features={self.features}: {first} of the block {self.z_matrix.block}, {rows} lengths "
            f"from column {first} on, {rows} angles from {first + rows}, {rows} torsions from "
            f"{first + 2 * rows}; circular={self.circular}; one-sided torsions of atoms "
            f"{tuple(row[0] for row in self.one_sided())}"
        )

    def _split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The whitened block, and lengths, angles and torsions of shape (N, rows, 3)."""
        internal = 3 * len(self.rows)
        whitened, standard = features.split([self.features - internal, internal], -1)
        return whitened, standard.reshape(len(features), 3, -1).mT * self.deviation + self.mean

    def _open(self, coordinates: Tensor) -> Tensor:
        """Torsions counted from their cut on, in [cut, cut + 2π)."""
        lengths_and_angles, torsions = coordinates.split([2, 1], -1)
        beyond = torch.remainder(torsions.squeeze(-1) - self.cuts, 2.0 * math.pi)
        return torch.cat([lengths_and_angles, (beyond + self.cuts).unsqueeze(-1)], -1)


_BINS = 72  # of 5°
_CONCENTRATION = 100.0  # a kernel of 6°
_MIN_SINE = 1e-3
_FILLED = 0.01  # density at the cut over the highest, from which on a torsion is a circle


def _sparsest(torsions: Tensor) -> tuple[Tensor, Tensor]:
    """For each column, where on the circle a kernel density estimate is lowest, and how low.

    The kernel exp(κ cos) is positive all around, so that in an empty stretch the minimum lies
    where the data is farthest. How low is told as a share of the highest density.
    """
    bins = ((torsions + math.pi) * (_BINS / (2.0 * math.pi))).long().remainder(_BINS)
    counts = torch.stack([torch.bincount(column, minlength=_BINS) for column in bins.T])
    centers = (torch.arange(_BINS, dtype=torsions.dtype) + 0.5) * (2.0 * math.pi / _BINS) - math.pi
    kernel = torch.exp(_CONCENTRATION * (torch.cos(centers - centers.unsqueeze(1)) - 1.0))
    density = counts.to(kernel) @ kernel
    return centers[density.argmin(-1)], density.amin(-1) / density.amax(-1)


def _bonds(topology: app.Topology | mdtraj.Topology) -> set[frozenset[int]]:
    bonds = topology.bonds if isinstance(topology, mdtraj.Topology) else topology.bonds()
    return {frozenset((first.index, second.index)) for first, second in bonds}


def _refuse_open_rings(
    topology: app.Topology | mdtraj.Topology,
    block: Sequence[int],
    rows: Sequence[tuple[int, int, int, int]],
) -> None:
    """An error when a bond closes a ring outside of the block."""
    lengths = {frozenset(row[:2]) for row in rows}
    closing = [
        sorted(bond) for bond in _bonds(topology) if bond not in lengths and not bond <= set(block)
    ]
    if closing:
        raise ValueError(
            f"the bond of atoms {min(closing)} closes a ring, so that its length is no coordinate "
            "and no flow keeps it: name all atoms of the ring in block, or pass circular=False"
        )


def _beside_sibling(topology: app.Topology | mdtraj.Topology, rows: Tensor) -> list[bool]:
    """For each row, whether its torsion refers to another neighbour of the atom it is bonded to."""
    bonds = _bonds(topology)
    return [frozenset((bond, torsion)) in bonds for _, bond, _, torsion in rows.tolist()]


def _ranges(coordinates: Tensor, cuts: Tensor, beside_sibling: list[bool]) -> tuple[Tensor, Tensor]:
    """Lowest and highest length, angle and torsion of each row, two tensors of shape (rows, 3).

    A torsion beside a sibling that lies on one side of the plane in all data is kept there.
    """
    lowest = torch.zeros_like(coordinates[0])
    highest = torch.full_like(lowest, math.inf)
    highest[:, 1] = math.pi
    lowest[:, 2], highest[:, 2] = cuts, cuts + 2.0 * math.pi
    for row, sibling in enumerate(beside_sibling):
        torsions = coordinates[:, row, 2]
        above = torsions.sin() > 0
        if sibling and bool((above == above[0]).all()):
            middle = 0.5 * math.pi if above[0] else -0.5 * math.pi
            turns = torch.round((torsions[0] - middle) / (2.0 * math.pi))
            center = middle + 2.0 * math.pi * turns
            lowest[row, 2], highest[row, 2] = center - 0.5 * math.pi, center + 0.5 * math.pi
    return lowest, highest


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
    constant = (~(deviation > RIGID)).nonzero()
    if len(constant):
        row, kind = constant[0].tolist()
        name = ("bond length", "bond angle", "torsion")[kind]
        raise ValueError(
            f"every coordinate must vary over the data, got a constant {name} of atom "
            f"{rows[row, 0]} (constraints, or too few frames)"
        )
