"""Rigid motions."""

import torch


def rotation(vector):
    """The matrix that turns by |vector| about the vector's axis."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [torch.stack(row, -1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    return torch.linalg.matrix_exp(torch.stack(rows, -2))


def move(positions, generator=None):
    """Turn and shift each frame of shape (N, 3·atoms) at random."""
    frames = positions.reshape(len(positions), -1, 3)
    draw = torch.randn(2, len(frames), 3, dtype=frames.dtype, generator=generator)
    moved = frames @ rotation(2.0 * draw[0]).mT + draw[1].unsqueeze(1)
    return moved.reshape(len(frames), -1)
