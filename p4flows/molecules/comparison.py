"""How far two sets of structures are apart: Ramachandran histograms, Wasserstein distances."""

import math

import numpy as np


def ramachandran_divergence(
    expected: np.ndarray,
    found: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    bins: int = 64,
) -> float:
    """KL divergence in nats between two histograms of φ and ψ (Midgley et al. 2023).

    The expected one is of the simulation. Two sets of N independent samples each of one
    distribution are not at zero, but at about (occupied bins)/N: give that number beside it.

    Args:
        expected: φ and ψ in radians, shape `(frames, 2)`.
        found: the same of the generator, shape `(samples, 2)`.
        weights: of the found ones, not negative, shape `(samples,)`; None for equal ones.
        bins: of each angle.

    Returns:
        Σ p ln(p/q), where half a sample in every bin of q keeps it finite.

    Raises:
        ValueError: when a shape is another one, or weights are negative or all zero.

    Example:
        >>> angles = np.random.default_rng(0).uniform(-3, 3, (1000, 2))
        >>> 0 < ramachandran_divergence(angles, angles, bins=8) < 0.01
        True
    """
    for name, angles in (("expected", expected), ("found", found)):
        if angles.ndim != 2 or angles.shape[1] != 2:
            raise ValueError(f"{name} must have shape (samples, 2), got {angles.shape}")
    shares = _checked_weights(weights, len(found))
    edges = [np.linspace(-math.pi, math.pi, bins + 1)] * 2
    phi, psi = _on_circle(expected).T
    counts, _, _ = np.histogram2d(phi, psi, bins=edges)
    phi, psi = _on_circle(found).T
    weighted, _, _ = np.histogram2d(phi, psi, bins=edges, weights=shares)
    p = counts / counts.sum()
    # Half a sample's weight where the weights are those of so many effective samples.
    q = weighted + 0.5 * np.square(shares).sum()
    q /= q.sum()
    filled = p > 0
    return float((p[filled] * np.log(p[filled] / q[filled])).sum())


def energy_distance(
    expected: np.ndarray, found: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Wasserstein-2 distance of two distributions of energies, exact in one dimension.

    Args:
        expected: reduced energies of the simulation, shape `(frames,)`.
        found: those of the generator, shape `(samples,)`.
        weights: of the found ones, not negative; None for equal ones.

    Returns:
        The distance in the units of the energies; one sample of 10²⁰ k_BT makes it large.

    Raises:
        ValueError: when weights have another shape, or are negative or all zero.

    Example:
        >>> round(energy_distance(np.arange(5.0), np.arange(5.0) + 2.0), 6)
        2.0
    """
    shares = _checked_weights(weights, len(found))
    order = np.argsort(found)
    ends = [np.arange(1, len(expected) + 1) / len(expected), np.cumsum(shares[order])]
    # Both quantile functions are constant between neighbouring ends.
    levels = np.sort(np.concatenate([[0.0], *ends]).clip(0.0, 1.0))
    middles = 0.5 * (levels[1:] + levels[:-1])
    values = [
        sorted_values[np.searchsorted(end, middles).clip(max=len(sorted_values) - 1)]
        for sorted_values, end in zip((np.sort(expected), found[order]), ends, strict=True)
    ]
    squares = np.square(values[0] - values[1])
    length = np.diff(levels)
    return float(np.sqrt((length[length > 0] * squares[length > 0]).sum()))


def torus_distance(
    expected: np.ndarray, found: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Wasserstein-2 distance of two sets of torsions on their torus, in radians.

    Solved exactly by POT (pip install 'p4flows[molecules]'): memory and time grow as
    frames·samples, some thousand of each take seconds.

    Args:
        expected: torsions in radians, shape `(frames, torsions)`.
        found: the same, shape `(samples, torsions)`.
        weights: of the found ones, not negative; None for equal ones.

    Returns:
        The distance.

    Raises:
        ModuleNotFoundError: when POT is not installed.
        ValueError: when the numbers of torsions differ, or weights do not suit.

    Example:
        >>> angles = np.random.default_rng(0).uniform(-3, 3, (50, 2))
        >>> round(torus_distance(angles, angles + 2 * np.pi), 6)
        0.0
    """
    if expected.ndim != 2 or found.ndim != 2 or expected.shape[1] != found.shape[1]:
        raise ValueError(
            f"expected and found must have alike torsions, got {expected.shape}, {found.shape}"
        )
    try:
        import ot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "torus_distance needs POT: pip install 'p4flows[molecules]'"
        ) from error
    shares = _checked_weights(weights, len(found))
    apart = _on_circle(expected[:, None, :] - found[None, :, :])
    equal = np.full(len(expected), 1.0 / len(expected))
    squared = ot.emd2(equal, shares, np.square(apart).sum(-1), numItermax=2_000_000)
    return math.sqrt(max(float(squared), 0.0))


def _on_circle(angles: np.ndarray) -> np.ndarray:
    return np.remainder(angles + math.pi, 2.0 * math.pi) - math.pi


def _checked_weights(weights: np.ndarray | None, samples: int) -> np.ndarray:
    """Weights in float64 that add up to one."""
    if weights is None:
        return np.full(samples, 1.0 / samples)
    wide = np.asarray(weights, dtype=np.float64)
    if wide.shape != (samples,):
        raise ValueError(f"weights must have shape ({samples},), got {wide.shape}")
    if not (wide >= 0).all() or not wide.sum() > 0:
        raise ValueError("weights must not be negative or all zero")
    return wide / wide.sum()
