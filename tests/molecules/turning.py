"""Rigid motions, and the log-determinant of positions with respect to features and them."""

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


def logabsdet_with_rigid_motion(transform, features):
    """ln|det| of each row from positions to features, translation and rotation, by autograd."""
    size = features.shape[1]

    def positions(variables):
        mixed, translation, turn = variables.split([size, 3, 3])
        atoms = transform.inverse(mixed.unsqueeze(0))[0].reshape(-1, 3)
        return (atoms @ rotation(turn).mT + translation).flatten()

    starts = torch.cat([features, features.new_zeros(len(features), 6)], -1)
    jacobians = [torch.autograd.functional.jacobian(positions, start) for start in starts]
    return -torch.linalg.slogdet(torch.stack(jacobians)).logabsdet
