"""MixedCoordinateTransform: whitened Cartesian block and internal coordinates (Appendix H)."""

import math
from collections.abc import Sequence

import torch
from nflows.transforms.base import Transform
from torch import Tensor

from p4flows.arguments import check_rows
from p4flows.molecules.internal import (
    AtomPlacement,
    internal_coordinates,
    triangles,
    volume_element,
)
from p4flows.molecules.topology import Rotor, Topology, bond_graph
from p4flows.molecules.whitening import RIGID, WhitenedBlock
from p4flows.molecules.z_matrix import find_z_matrix
from p4flows.transforms.spline_coupling import wrapped


class MixedCoordinateTransform(Transform):
    """Cartesian coordinates of a molecule ↔ standardised mixed coordinates (Noé et al. 2019).

    A block of k atoms keeps Cartesian coordinates, superposed and whitened; each other atom has a
    bond length, a bond angle and a torsion from a z-matrix (`find_z_matrix`); one that closes a
    ring has two bond lengths and a torsion. All are brought to mean 0 and variance 1 over the data;
    a torsion's circle is cut open where the data is sparsest. The columns are [block, lengths,
    angles, torsions], 3·atoms − 6 of them: rigid motions are dropped, and the inverse puts the
    block's centre at the origin, in the orientation of the data's mean.

    **Circles.** With `circular=True` a torsion whose density at its cut is more than 1 % of its
    highest stays an angle in [−π, π), in radians: the columns `circular`, for a flow on R^p × T^q.

    **Hands.** No simulation mirrors a chiral centre. A torsion relative to a sibling whose data
    stays on one side of the plane is kept there (as Schopmans and Friederich 2025 do), and a block
    keeps its hand. Nothing is clamped: samples that `covers` rejects are to have weight zero.

    **Equivalent atoms.** A third of a turn of a methyl group exchanges its hydrogens, and a flow
    would have to learn each structure three times. For each of `rotors`, the torsion of its first
    atom is replaced by the mean over its branches, a shear, and multiplied by the order n; `fold`
    exchanges atoms so that it lies on the n-th part of the circle that stands for all.

    **The log-determinant** is that of (features q, translation t, rotation vector ω) → x =
    exp([ω]×) x(q) + t at t = ω = 0: a density exp(−u(x)) that does not depend on position and
    orientation has the density exp(−u(x(q)) + logabsdet) of q, up to normalisation.

    Results are finite also where it is no bijection: beyond a cut, for a negative length, an angle
    outside of (0, π), and where atoms are collinear or coincide.

    Args:
        data: frames in nm, shape `(frames, 3·atoms)`; it gives dtype and device.
        topology: an OpenMM or mdtraj topology with all bonds.
        rotors: groups to be folded, of `find_rotors`; those that the z-matrix does not turn by one
            torsion are left out.
        block: the atoms that keep Cartesian coordinates, at least three and connected; by default
            as `find_z_matrix` chooses.
        circular: whether torsions that the data shows to turn freely stay on the circle.

    Attributes:
        z_matrix: the `ZMatrix`.
        rotors: those that are folded.
        features: number of columns of the mixed coordinates, 3·atoms − 6.
        circular: the columns that are angles in [−π, π), in ascending order; the others are
            Euclidean.

    Raises:
        TypeError: when the data is not a floating-point tensor, the topology of another class or
            circular not a bool.
        ValueError: when the data has another number of atoms or is not finite, three atoms that a
            torsion refers to are collinear in a frame, a coordinate never varies (constraints), the
            block does not suit the molecule, or an atom closes two rings at once.

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
    closing: Tensor
    cuts: Tensor
    mean: Tensor
    deviation: Tensor
    on_circle: Tensor
    lowest: Tensor
    highest: Tensor
    order: Tensor
    shear: Tensor
    ideal: Tensor

    def __init__(
        self,
        data: Tensor,
        topology: Topology,
        *,
        rotors: Sequence[Rotor] = (),
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
        rows = torch.tensor(self.z_matrix.rows, dtype=torch.int64).reshape(-1, 4)
        self.register_buffer("rows", rows)
        self.register_buffer("closing", torch.tensor(self.z_matrix.closing, dtype=torch.bool))
        self.placement = AtomPlacement(self.z_matrix)
        flat = data.detach().cpu().double()
        _refuse_collinear(flat.reshape(-1, self._atoms, 3), rows)
        coordinates = self._internal(flat)
        self._add_rotors(rotors, coordinates[..., 2])
        cuts, filling = _sparsest(wrapped(self._merge(coordinates)[..., 2]))
        self.register_buffer("cuts", cuts)
        self.register_buffer("on_circle", (filling > _FILLED) & circular)
        flat = self.fold(flat)
        self.whitening = WhitenedBlock(flat.reshape(-1, self._atoms, 3)[:, self._block])
        coordinates = self._open(self._internal(flat))
        mean, deviation = coordinates.mean(0), coordinates.std(0)
        _refuse_constant(deviation, rows)
        mean[:, 2] = torch.where(self.on_circle, cuts + math.pi, mean[:, 2])
        deviation[:, 2] = torch.where(self.on_circle, 1.0, deviation[:, 2])
        graph = bond_graph(topology)
        beside = [graph.has_edge(row[1], row[3]) for row in self.z_matrix.rows]
        siblings = torch.tensor(beside, dtype=torch.bool) & ~self.closing
        lowest, highest = _ranges(coordinates, cuts, siblings)
        for name, value in (
            ("mean", mean),
            ("deviation", deviation),
            ("lowest", lowest),
            ("highest", highest),
        ):
            self.register_buffer(name, value)
        self.to(data)

    def _add_rotors(self, rotors: Sequence[Rotor], torsions: Tensor) -> None:
        """Find the rows of each rotor, and leave out those that have none."""
        place = {row[0]: number for number, row in enumerate(self.z_matrix.rows)}
        rows = len(place)
        order, ideal = torch.ones(rows).double(), torch.zeros(rows).double()
        shear = torch.zeros(rows, rows).double()
        self.rotors: list[Rotor] = []
        self._turns: list[tuple[int, Tensor]] = []
        for rotor in rotors:
            outside, centre = rotor.axis
            own = [n for n, row in enumerate(self.z_matrix.rows) if row[1:3] == (centre, outside)]
            first = own[0] if len(own) == rotor.order else -1
            atom = self.z_matrix.rows[first][0]
            if first < 0 or any(self.z_matrix.rows[row][3] != atom for row in own[1:]):
                continue
            permutation = torch.tensor(rotor.permutation)
            # The atom that a turn brings to the first one's place is to be ahead of it.
            ahead = place[int(permutation[atom])]
            if rotor.order == 3 and _mean_angle(torsions[:, ahead]) < 0:
                permutation = permutation[permutation]
                ahead = place[int(permutation[atom])]
            for row in own[1:]:
                ideal[row] = 2.0 * math.pi / rotor.order * (1 if row == ahead else 2)
            shear[own[1:], first] = 1.0 / rotor.order
            order[first] = rotor.order
            self.rotors.append(rotor)
            self._turns.append((first, permutation))
        for name, value in (("order", order), ("shear", shear), ("ideal", ideal)):
            self.register_buffer(name, value)

    def fold(self, inputs: Tensor) -> Tensor:
        """Exchange equivalent atoms, so that structures that differ by labels become one.

        Args:
            inputs: positions in nm, shape `(N, 3·atoms)`.

        Returns:
            Positions of the same shape; `covers` holds for their features.
        """
        check_rows(inputs, 3 * self._atoms)
        positions = inputs
        for row, permutation in self._turns:
            torsions = self._merge(self._internal(positions))[:, row, 2]
            ahead = torch.floor((torsions - self.cuts[row]) / (2.0 * math.pi)).long()
            positions = _turned(positions, permutation, -ahead, int(self.order[row]))
        return positions

    def unfold(self, inputs: Tensor) -> Tensor:
        """Put equivalent atoms in one of their orders at random, from torch's global generator.

        Args:
            inputs: positions in nm, shape `(N, 3·atoms)`.

        Returns:
            Positions of the same shape, whose density is the same for all labels.
        """
        positions = inputs
        for row, permutation in self._turns:
            order = int(self.order[row])
            times = torch.randint(order, (len(inputs),), device=inputs.device)
            positions = _turned(positions, permutation, times, order)
        return positions

    def _internal(self, inputs: Tensor) -> Tensor:
        positions = inputs.reshape(-1, self._atoms, 3)
        return internal_coordinates(positions, self.rows, self.closing)

    def _merge(self, coordinates: Tensor) -> Tensor:
        """The first torsion of each rotor replaced by n times the mean over its branches."""
        others, torsions = coordinates.split([2, 1], -1)
        torsions = torsions.squeeze(-1)
        mean = torsions + wrapped(torsions - self.ideal) @ self.shear
        return torch.cat([others, (mean * self.order).unsqueeze(-1)], -1)

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
        coordinates = self._internal(inputs)
        volume = volume_element(positions, coordinates, self.rows, self.closing) + self._scale()
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
        whitened, opened = self._split(inputs)
        block, logabsdet = self.whitening.inverse(whitened)
        coordinates = self._separate(opened)
        positions = self.placement(block, coordinates)
        volume = volume_element(positions, coordinates, self.rows, self.closing) + self._scale()
        return positions.flatten(1), logabsdet + volume

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
        whitened, opened = self._split(inputs)
        inside = ((opened >= self.lowest) & (opened <= self.highest)).flatten(1).all(-1)
        inside &= self.whitening.keeps_hand(whitened)
        if bool(self.closing.any()):
            coordinates = self._separate(opened)
            positions = self.placement(self.whitening.inverse(whitened)[0], coordinates)
            inside &= triangles(positions, coordinates, self.rows, self.closing).all(-1)
        return inside

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

    def _scale(self) -> Tensor:
        """What standardising and the rotors' orders change of the volume, by its logarithm."""
        return self.deviation.log().sum() - self.order.log().sum()

    def _open(self, coordinates: Tensor) -> Tensor:
        """Torsions counted from their cut on, in [cut, cut + 2π), rotors' in n times as much."""
        merged = self._merge(coordinates)
        others, torsions = merged.split([2, 1], -1)
        turn = 2.0 * math.pi * self.order
        beyond = torch.remainder(torsions.squeeze(-1) - self.cuts, turn)
        return torch.cat([others, (beyond + self.cuts).unsqueeze(-1)], -1)

    def _separate(self, opened: Tensor) -> Tensor:
        """The inverse of `_open`, up to whole turns."""
        others, torsions = opened.split([2, 1], -1)
        mean = torsions.squeeze(-1) / self.order
        torsions = mean - wrapped(mean - self.ideal) @ self.shear
        return torch.cat([others, torsions.unsqueeze(-1)], -1)


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


def _turned(positions: Tensor, permutation: Tensor, times: Tensor, order: int) -> Tensor:
    """Rows of positions whose atoms are permuted so many times, modulo the order."""
    atoms = positions.unflatten(-1, (-1, 3))
    left = torch.remainder(times, order)
    for _ in range(order - 1):
        permuted = atoms[:, permutation.to(atoms.device)]
        atoms = torch.where((left > 0)[:, None, None], permuted, atoms)
        left = left - 1
    return atoms.flatten(1)


def _mean_angle(torsions: Tensor) -> float:
    return torch.atan2(torsions.sin().mean(), torsions.cos().mean()).item()


def _ranges(coordinates: Tensor, cuts: Tensor, siblings: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest length, angle and torsion of each row, two tensors of shape (rows, 3).

    A torsion beside a sibling that lies on one side of the plane in all data is kept there.
    """
    lowest = torch.zeros_like(coordinates[0])
    highest = torch.full_like(lowest, math.inf)
    # A second bond length is nowhere near π nm either.
    highest[:, 1] = math.pi
    lowest[:, 2], highest[:, 2] = cuts, cuts + 2.0 * math.pi
    for row in siblings.nonzero().flatten().tolist():
        torsions = coordinates[:, row, 2]
        above = torsions.sin() > 0
        if bool((above == above[0]).all()):
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
