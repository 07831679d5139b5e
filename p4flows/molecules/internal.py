"""Bond lengths, angles and torsions of a z-matrix, and the positions that have them."""

import torch
from torch import Tensor, nn

from p4flows.molecules.z_matrix import ZMatrix


def internal_coordinates(positions: Tensor, rows: Tensor, closing: Tensor) -> Tensor:
    """(Length, angle, torsion) of rows of a z-matrix, (N, atoms, 3) → (N, rows, 3), in nm and rad.

    They are the spherical coordinates of an atom around the one that it is bonded to, in a frame
    that the other two span. An atom that closes a ring has its second bond length instead of the
    angle. Collinear or coincident atoms give arbitrary, but finite numbers.
    """
    atom, bond, angle, torsion = positions[:, rows].unbind(2)
    frame = _local_frame(bond, angle, torsion)
    along, aside, above = (frame @ (atom - bond).unsqueeze(-1)).squeeze(-1).unbind(-1)
    radial = _norm(torch.stack([aside, above], -1))
    second = torch.where(closing, _norm(atom - angle), torch.atan2(radial, along))
    return torch.stack([_norm(atom - bond), second, _atan2(above, aside)], -1)


def place(
    coordinates: Tensor, closing: Tensor, bond: Tensor, angle: Tensor, torsion: Tensor
) -> Tensor:
    """The position from coordinates and three positions, all of shape (N, rows, 3): the inverse.

    Finite also where two lengths make no triangle.
    """
    length, second, phi = coordinates.unbind(-1)
    across = _norm(angle - bond)
    tiny = torch.finfo(length.dtype).tiny
    twice = (2.0 * length * across).abs().clamp_min(tiny)
    closed = ((length**2 + across**2 - second**2) / twice).clamp(-1.0, 1.0)
    cosine = torch.where(closing, closed, second.cos())
    # Inside the root, because its slope at zero is infinite.
    sine = torch.where(closing, (1.0 - closed**2).clamp_min(tiny).sqrt(), second.sin())
    components = torch.stack([cosine, sine * phi.cos(), sine * phi.sin()], -1)
    frame = _local_frame(bond, angle, torsion)
    return bond + length.unsqueeze(-1) * (components.unsqueeze(-2) @ frame).squeeze(-2)


def volume_element(positions: Tensor, coordinates: Tensor, rows: Tensor, closing: Tensor) -> Tensor:
    """ln |∂position/∂coordinates| summed over the rows, shape (N,); finite everywhere.

    It is ln(r² sin θ) of a length and an angle, and ln(r₁ r₂/d) of two lengths to atoms d apart.
    """
    length, second, _ = coordinates.unbind(-1)
    tiny = torch.finfo(coordinates.dtype).tiny
    across = _norm(positions[:, rows[:, 1]] - positions[:, rows[:, 2]])
    other = torch.where(closing, second / across, length * second.sin())
    return (length.abs().clamp_min(tiny).log() + other.abs().clamp_min(tiny).log()).sum(-1)


def triangles(positions: Tensor, coordinates: Tensor, rows: Tensor, closing: Tensor) -> Tensor:
    """Which rows' lengths there is a triangle for, shape (N, rows)."""
    length, second, _ = coordinates.unbind(-1)
    across = _norm(positions[:, rows[:, 1]] - positions[:, rows[:, 2]])
    return ~closing | (((length - second).abs() < across) & (across < length + second))


class AtomPlacement(nn.Module):
    """All atoms of a molecule from its Cartesian block and the internal coordinates of the others.

    Atoms whose references are placed at the same of the `stages` are placed together.
    """

    _order: Tensor
    _closing: Tensor

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
            self._keep(f"_rows_{number}", torch.tensor(chosen))
            self._keep(f"_references_{number}", torch.tensor(references))
        self._keep("_order", torch.tensor([slot[atom] for atom in range(len(slot))]))
        self._keep("_closing", torch.tensor(z_matrix.closing, dtype=torch.bool))

    def _keep(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values, persistent=False)

    def forward(self, block: Tensor, coordinates: Tensor) -> Tensor:
        """Positions (N, atoms, 3) in the topology's order, of those of the block and the rows'."""
        placed = block
        for number in range(1, self.stages + 1):
            rows = self.get_buffer(f"_rows_{number}")
            references = placed[:, self.get_buffer(f"_references_{number}")].unbind(2)
            placed = torch.cat(
                [placed, place(coordinates[:, rows], self._closing[rows], *references)], 1
            )
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
