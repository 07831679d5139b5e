"""A panel of φ and ψ, for the figures of molecules."""

from typing import Any

import numpy as np

RANGE = (-180.0, 180.0)
TICKS = (-180, -90, 0, 90, 180)


def ramachandran(
    axis: Any, torsions: np.ndarray, title: str, weights: np.ndarray | None = None
) -> None:
    """Free energy −ln p in k_BT above its lowest, from φ and ψ in degrees, shape (frames, 2)."""
    counts, *_ = np.histogram2d(*torsions.T, bins=72, range=[RANGE, RANGE], weights=weights)
    free_energy = -np.log(np.where(counts > 0, counts, np.nan) / counts.max())
    axis.imshow(free_energy.T, origin="lower", extent=RANGE * 2, cmap="viridis_r", vmax=7)
    axis.set(title=title, xlabel="φ", xticks=TICKS, yticks=TICKS[::2])
