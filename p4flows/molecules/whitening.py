"""Whitened Cartesian coordinates of a block of atoms, freed of rigid motions (Noé et al. 2019)."""

import math

import torch
from torch import Tensor, nn


class WhitenedBlock(nn.Module):
    """3k Cartesian coordinates ↔ 3k − 6 whitened ones, by superposition and principal components.

    A frame is superposed on a reference with least squares. Superposed frames satisfy Σ yᵢ = 0 and
    Σ rᵢ × yᵢ = 0 (r the reference), six linear equations; the principal components of the data
    in the space that is left lose nothing, and each is divided by its standard deviation.

    `frames` are float64, in nm, of shape (frames, k, 3); `handed` tells whether the block is the
    same of two mirror images in all of them.
    """

    reference: Tensor
    mean: Tensor
    components: Tensor
    deviations: Tensor
    constant: Tensor
    handed: Tensor

    def __init__(self, frames: Tensor) -> None:
        super().__init__()
        atoms = frames.shape[1]
        reference = frames[0] - frames[0].mean(0)
        for _ in range(_SUPERPOSITIONS):
            reference = _superpose(frames, reference).mean(0)
        rigid = _rigid_motions(reference)
        spread = torch.linalg.svdvals(rigid)
        if spread[-1] < 1e-6 * spread[0]:
            raise ValueError("the atoms of the Cartesian block must not be collinear")
        superposed = _superpose(frames, reference).flatten(1)
        mean = superposed.mean(0)
        variances, vectors = torch.linalg.eigh(torch.cov(superposed.T))
        deviations = variances[6:].clamp_min(0.0).sqrt().flip(0)
        varying = deviations > RIGID
        if not bool(varying.all()):
            raise ValueError(
                f"the Cartesian block must vary in {len(deviations)} directions, got "
                f"{int(varying.sum())}: constrained bonds cannot be whitened, and fewer frames "
                "than directions do not span them"
            )
        # Rigid motions as columns of length √k and √inertia; the last three are the rotations.
        inertia = rigid[:, 3:].T @ rigid[:, 3:]
        constant = deviations.log().sum() + 1.5 * math.log(atoms) - 0.5 * torch.logdet(inertia)
        for name, value in (
            ("reference", reference),
            ("mean", mean),
            ("components", vectors[:, 6:].flip(1)),
            ("deviations", deviations),
            ("constant", constant),
            ("handed", (_hand(superposed.reshape_as(frames), reference) > 0).all()),
        ):
            self.register_buffer(name, value)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(N, k, 3) → whitened (N, 3k − 6) and logabsdet, minus that of `inverse`."""
        superposed = _superpose(positions, self.reference)
        whitened = (superposed.flatten(1) - self.mean) @ self.components / self.deviations
        return whitened, -self._volume(superposed)

    def inverse(self, whitened: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened → positions at the origin, in the reference's orientation, and logabsdet.

        It is that of the map from whitened coordinates, a translation and a rotation vector.
        """
        flat = self.mean + (whitened * self.deviations) @ self.components.T
        positions = flat.reshape(len(flat), -1, 3)
        return positions, self._volume(positions)

    def keeps_hand(self, whitened: Tensor) -> Tensor:
        """Which rows are no mirror images of the data; all of them for a block not `handed`."""
        positions, _ = self.inverse(whitened)
        return (_hand(positions, self.reference) > 0) | ~self.handed

    def _volume(self, superposed: Tensor) -> Tensor:
        # Of a turn by ω, the part within the rotations of the reference is (tr S − S) ω, where
        # S = Σ rᵢ yᵢᵀ; the rest of it is a change of shape, which leaves the determinant alone.
        gain = torch.linalg.det(_rotation_gain(self.reference.T @ superposed))
        return self.constant + gain.abs().clamp_min(torch.finfo(gain.dtype).tiny).log()


_SUPERPOSITIONS = 10
# Standard deviation in nm or rad below which a coordinate does not move: a constraint solver leaves
# 1e-6 of it, a vibration at 1 K has 1e-4.
RIGID = 1e-5


def _rigid_motions(positions: Tensor) -> Tensor:
    """Velocities of unit translations and rotations as columns, shape (3k, 6)."""
    axes = torch.eye(3, dtype=positions.dtype)
    translations = axes.unsqueeze(1).expand(3, len(positions), 3)
    rotations = torch.linalg.cross(axes.unsqueeze(1), positions.unsqueeze(0))
    return torch.cat([translations, rotations]).flatten(1).T


def _rotation_gain(correlation: Tensor) -> Tensor:
    """tr(S) I − S for S = Σ rᵢ yᵢᵀ of shape (N, 3, 3)."""
    trace = correlation.diagonal(dim1=-2, dim2=-1).sum(-1)
    identity = torch.eye(3, dtype=correlation.dtype, device=correlation.device)
    return trace[:, None, None] * identity - correlation


def _hand(positions: Tensor, reference: Tensor) -> Tensor:
    """det Σ rᵢ yᵢᵀ, negative for a mirror image of a block that is not flat."""
    return torch.linalg.det(reference.T @ positions)


def _superpose(positions: Tensor, reference: Tensor) -> Tensor:
    """Centre and turn frames onto a reference (Kabsch), proper rotations only.

    Gradients do not go through the singular vectors, which have none where singular values meet
    (a regular tetrahedron). A turn of zero, which keeps S symmetric to first order, carries them.
    """
    centred = positions - positions.mean(1, keepdim=True)
    with torch.no_grad():
        left, _, right = torch.linalg.svd(reference.T @ centred)
        sign = torch.linalg.det(left @ right)
        left[:, :, 2] *= sign.unsqueeze(-1)
        rotation = (left @ right).mT
    turned = centred @ rotation
    correlation = reference.T @ turned
    # (tr S − S) ω = Σ yᵢ × rᵢ.
    asymmetry = torch.linalg.cross(turned, reference.expand_as(turned)).sum(1)
    gain = _rotation_gain(correlation.detach())
    turn = torch.linalg.lstsq(gain, asymmetry.unsqueeze(-1)).solution.mT
    return turned + torch.linalg.cross((turn - turn.detach()).expand_as(turned), turned)
