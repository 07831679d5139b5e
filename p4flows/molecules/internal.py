"""Bond lengths, angles and torsions of a z-matrix, and the positions that have them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from p4flows.molecules.z_matrix import ZMatrix


def internal_coordinates(positions: Tensor, rows: Tensor) -> Tensor:
    """Bond length, bond angle and torsion of each row of a z-matrix.

    They are the spherical coordinates of an atom around the one that it is bonded to, in a frame
    that the other two span. Collinear or coincident atoms give arbitrary, but finite numbers.

    Args:
        positions: in nm, shape `(N, atoms, 3)`.
        rows: (atom, bond, angle, torsion), shape `(rows, 4)`, int64.

    Returns:
        Tensor of shape `(N, rows, 3)`: length in nm, angle in [0, π], torsion in [−π, π].

    Example:
        >>> square = torch.tensor([[[0.0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0]]])
        >>> internal_coordinates(square, torch.tensor([[0, 1, 2, 3]])).tolist()
        [[[1.0, 1.5707963705062866, 0.0]]]
    """
    atom, bond, angle, torsion = positions[:, rows].unbind(2)
    frame = _local_frame(bond, angle, torsion)
    along, aside, above = (frame @ (atom - bond).unsqueeze(-1)).squeeze(-1).unbind(-1)
    radial = _norm(torch.stack([aside, above], -1))
    length = _norm(atom - bond)
    return torch.stack([length, torch.atan2(radial, along), _atan2(above, aside)], -1)


def place(coordinates: Tensor, bond: Tensor, angle: Tensor, torsion: Tensor) -> Tensor:
    """The position that has the given internal coordinates, the inverse of the above.

    Args:
        coordinates: length, angle and torsion, shape `(N, rows, 3)`.
        bond: positions of the atoms that the length refers to, shape `(N, rows, 3)`.
        angle: those of the bond angle, same shape.
        torsion: those of the torsion, same shape.

    Returns:
        Positions, shape `(N, rows, 3)`.
    """
    length, theta, phi = coordinates.unsqueeze(-1).unbind(-2)
    along, aside, above = _local_frame(bond, angle, torsion).unbind(-2)
    across = torch.cos(phi) * aside + torch.sin(phi) * above
    return bond + length * (torch.cos(theta) * along + torch.sin(theta) * across)


def volume_element(coordinates: Tensor) -> Tensor:
    """ln |∂position/∂(length, angle, torsion)| = ln(length²·|sin angle|), summed over the rows.

    Args:
        coordinates: shape `(N, rows, 3)`.

    Returns:
        Tensor of shape `(N,)`; finite also where an atom sits on its reference.
    """
    length, theta, _ = coordinates.unbind(-1)
    tiny = torch.finfo(coordinates.dtype).tiny
    factors = 2.0 * length.abs().clamp_min(tiny).log() + theta.sin().abs().clamp_min(tiny).log()
    return factors.sum(-1)


class AtomPlacement(nn.Module):
    """All atoms of a molecule from its Cartesian block and the internal coordinates of the others.

    Atoms whose references are placed at the same stage are placed together.

    Args:
        z_matrix: block and rows.

    Attributes:
        stages: number of calls of `place`.

    Example:
        >>> from p4flows.molecules import alanine_dipeptide, find_z_matrix
        >>> molecule = alanine_dipeptide()
        >>> z_matrix = find_z_matrix(molecule.topology)
        >>> positions = torch.tensor(molecule.positions).unsqueeze(0)
        >>> coordinates = internal_coordinates(positions, torch.tensor(z_matrix.rows))
        >>> placed = AtomPlacement(z_matrix)(positions[:, list(z_matrix.block)], coordinates)
        >>> torch.allclose(placed, positions)
        True
    """

    _order: Tensor

    def __init__(self, z_matrix: ZMatrix) -> None:
        super().__init__()
        stage = dict.fromkeys(z_matrix.block, 0)
        for atom, bond, angle, torsion in z_matrix.rows:
            stage[atom] = 1 + max(stage[bond], stage[angle], stage[torsion])
        self.stages = max(stage.values())
        slot = {atom: index for index, atom in enumerate(z_matrix.block)}
        for number in range(1, self.stages + 1):
            chosen = [i for i, row in enumerate(z_matrix.rows) if stage[row[0]] == number]
            references = [[slot[atom] for atom in z_matrix.rows[i][1:]] for i in chosen]
            slot |= {z_matrix.rows[i][0]: len(slot) + k for k, i in enumerate(chosen)}
            self._index(f"_rows_{number}", chosen)
            self._index(f"_references_{number}", references)
        self._index("_order", [slot[atom] for atom in range(len(slot))])

    def _index(self, name: str, values: Sequence[int] | Sequence[list[int]]) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(self, block: Tensor, coordinates: Tensor) -> Tensor:
        """Positions of all atoms.

        Args:
            block: positions of the block's atoms, shape `(N, block, 3)`.
            coordinates: of the z-matrix's rows, shape `(N, rows, 3)`.

        Returns:
            Positions, shape `(N, atoms, 3)`, in the topology's order.
        """
        placed = block
        for number in range(1, self.stages + 1):
            rows = self.get_buffer(f"_rows_{number}")
            bond, angle, torsion = placed[:, self.get_buffer(f"_references_{number}")].unbind(2)
            placed = torch.cat([placed, place(coordinates[:, rows], bond, angle, torsion)], 1)
        return placed[:, self._order]


def _local_frame(bond: Tensor, angle: Tensor, torsion: Tensor) -> Tensor:
    """Orthonormal rows (…, 3, 3): along bond → angle, toward the torsion's atom, and across."""
    along = _unit(angle - bond)
    beyond = torsion - angle
    aside = _unit(beyond - (beyond * along).sum(-1, keepdim=True) * along)
    return torch.stack([along, aside, torch.linalg.cross(aside, along)], -2)


def _norm(vector: Tensor) -> Tensor:
    """Euclidean norm whose gradient is finite everywhere."""
    tiny = torch.finfo(vector.dtype).tiny
    return vector.square().sum(-1).clamp_min(tiny).sqrt()


def _unit(vector: Tensor) -> Tensor:
    return vector / _norm(vector).unsqueeze(-1)


def _atan2(y: Tensor, x: Tensor) -> Tensor:
    """The angle of (x, y), zero with zero gradient where there is none."""
    undefined = (x == 0) & (y == 0)
    return torch.atan2(y, torch.where(undefined, 1.0, x))
