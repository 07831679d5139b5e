"""Figures of merit, figure and table of examples/boltzmann_generator.py."""

import math
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from boltzmann_generator_problem import Frames, Problem
from nflows.flows.base import Flow
from ramachandran import ramachandran, states
from torch import Tensor

from p4flows import diagnose
from p4flows.molecules import (
    OpenMMEnergy,
    WeightedSamples,
    bootstrap_error,
    clipped,
    effective_sample_size,
    energy_distance,
    forward_effective_sample_size,
    free_energy_difference,
    kl_divergences,
    log_weights_of,
    ramachandran_divergence,
    state_statistics,
    torus_distance,
)

CLIP = 1e-4
FRAMES = 20_000  # of the held-out replica, for what needs their energies
TRANSPORTED = 2_000  # rows of an exact transport problem


def spaced(rows: Any, count: int) -> Any:
    """At most `count` rows of an array or tensor, evenly spaced."""
    return rows[:: max(1, len(rows) // count)][:count]


def correlation_length(series: np.ndarray) -> float:
    """Consecutive frames that are worth one independent: 1 + 2 Σ of the autocorrelation."""
    centered = series - series.mean()
    spectrum = np.fft.rfft(centered, 2 * len(series))
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[: len(series)]
    correlation /= correlation[0]
    # What comes after it has fallen to zero is noise.
    end = np.argmax(correlation <= 0) or len(series)
    return float(1.0 + 2.0 * correlation[1:end].sum())


@torch.no_grad()
def merits(
    problem: Problem,
    flow: Flow,
    drawn: WeightedSamples,
    energy: OpenMMEnergy,
    seed: int,
) -> dict[str, Any]:
    """All numbers about samples, and against a simulation at their temperature, if there is one."""
    generator = torch.Generator().manual_seed(seed)
    log_weights = drawn.log_weights
    torsions = problem.torsions(drawn.positions)
    label = torch.from_numpy(states(np.degrees(torsions)))
    numbers: dict[str, Any] = {"outside": (log_weights == -math.inf).double().mean().item()}

    def difference(log_weights: Tensor, where: Tensor) -> float:
        return free_energy_difference(log_weights, where == 0, where == 1)

    numbers |= _sizes(log_weights, generator)
    numbers["free_energy_kt"] = difference(log_weights, label)
    numbers["free_energy_kt_error"] = bootstrap_error(
        difference, log_weights, label, generator=generator
    )
    numbers["free_energy_raw_kt"] = free_energy_difference(
        torch.zeros(len(label)), label == 0, label == 1
    )
    numbers["inverse_error"] = max((row.error.right.item() for row in diagnose(flow)), default=None)
    if math.isclose(energy.temperature, problem.temperature):
        seen = spaced(problem.training, FRAMES)
        numbers["nll_training"] = _nll(flow, problem, seen)
        # Without the energies of the frames, whose mean differs from replica to replica.
        _, numbers["kl_forward_training"] = kl_divergences(
            log_weights, log_weights_of(flow, problem.coordinates, energy, seen)
        )
    compared = problem.compared(energy.temperature)
    if compared is None:
        return numbers
    return numbers | _against_simulation(problem, flow, drawn, energy, *compared, generator)


@torch.no_grad()
def merits_of_mean(
    problem: Problem,
    flow: Flow,
    drawn: WeightedSamples,
    energy: OpenMMEnergy,
    turns: Tensor,
    seed: int,
) -> dict[str, Any]:
    """Effective sample sizes of the density that is the mean over turns of the methyl groups."""
    generator = torch.Generator().manual_seed(seed)
    numbers: dict[str, Any] = {"orders": len(turns), "samples": len(drawn.log_weights)}
    numbers |= _sizes(drawn.log_weights, generator)
    compared = problem.compared(energy.temperature)
    if compared is not None:
        held_out = spaced(compared[1], FRAMES)
        log_weights = log_weights_of(flow, problem.coordinates, energy, held_out, symmetries=turns)
        numbers["forward_ess"] = forward_effective_sample_size(log_weights)
    return numbers


def _against_simulation(
    problem: Problem,
    flow: Flow,
    drawn: WeightedSamples,
    energy: OpenMMEnergy,
    simulated: Frames,
    held_out: Tensor,
    generator: torch.Generator,
) -> dict[str, Any]:
    held_out = spaced(held_out, FRAMES)
    torsions = problem.torsions(drawn.positions)
    frame_log_weights = log_weights_of(flow, problem.coordinates, energy, held_out)
    reverse, forward = kl_divergences(drawn.log_weights, frame_log_weights)
    expected = problem.torsions(simulated[:])
    weights = torch.softmax(clipped(drawn.log_weights.double(), CLIP), 0).numpy()
    middle = len(simulated.replicas) // 2
    halves = [problem.torsions(simulated[:middle]), problem.torsions(simulated[middle:])]
    energies = energy(held_out).double().numpy()
    found = drawn.energies.double().numpy()
    rows = torch.randperm(len(found), generator=generator)[:TRANSPORTED].numpy()
    weighted_rows = torch.multinomial(
        torch.from_numpy(weights), TRANSPORTED, replacement=True, generator=generator
    ).numpy()
    frames = spaced(expected, TRANSPORTED)
    return {
        "nll": _nll(flow, problem, held_out),
        "forward_ess": forward_effective_sample_size(frame_log_weights),
        "kl_reverse": reverse,
        "kl_forward": forward,
        "ramachandran_raw": ramachandran_divergence(expected, torsions),
        "ramachandran": ramachandran_divergence(expected, torsions, weights),
        "ramachandran_simulation": ramachandran_divergence(*halves),
        "energy_correlation": correlation_length(
            energy(simulated.replicas[-1, :FRAMES]).double().numpy()
        ),
        "median_shift": float(np.median(found) - np.median(energies)),
        "energy_w2": energy_distance(energies, np.minimum(found, energies.max() + 100.0)),
        "energy_w2_reweighted": energy_distance(
            energies, np.where(weights > 0, found, 0.0), weights
        ),
        "torus_w2": torus_distance(frames, torsions[rows]),
        "torus_w2_reweighted": torus_distance(frames, torsions[weighted_rows]),
        "torus_w2_simulation": torus_distance(*(spaced(half, TRANSPORTED) for half in halves)),
        **_simulated_free_energy(problem, simulated),
    }


def _sizes(log_weights: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Effective sample sizes, raw and clipped, with their errors."""

    def clipped_size(log_weights: Tensor) -> float:
        return effective_sample_size(log_weights, clip=CLIP)

    numbers = {}
    for name, size in (("ess", effective_sample_size), ("ess_clipped", clipped_size)):
        numbers[name] = size(log_weights)
        numbers[f"{name}_error"] = bootstrap_error(size, log_weights, generator=generator)
    return numbers


def _nll(flow: Flow, problem: Problem, frames: Tensor) -> float:
    """Mean negative log-likelihood of the features of frames, in nats."""
    features, _ = problem.coordinates(frames)
    return -torch.cat([flow.log_prob(rows) for rows in features.split(5_000)]).mean().item()


def _simulated_free_energy(problem: Problem, simulated: Frames) -> dict[str, Any]:
    """ΔF between the two states of the simulation; the error is the scatter of its replicas."""
    labels = states(np.degrees(problem.torsions(simulated.replicas.flatten(0, 1))))
    labels = np.where(simulated.trans, labels.reshape(simulated.trans.shape), -1)
    shares = np.stack([(labels == state).mean(1) for state in (0, 1)])
    left, right = shares.mean(1)
    known = left > 0 and right > 0
    errors = shares.std(1, ddof=1) / math.sqrt(shares.shape[1])
    return {
        "transitions": state_statistics(labels).transitions,
        "free_energy_simulation": math.log(left / right) if known else math.nan,
        "free_energy_simulation_error": (
            math.hypot(errors[0] / left, errors[1] / right) if known else math.nan
        ),
    }


def distributions(
    problem: Problem, drawn: WeightedSamples, energy: OpenMMEnergy
) -> dict[str, np.ndarray]:
    """What `figure` draws: energies and torsions of simulation and samples, and their weights."""
    compared = problem.compared(energy.temperature)
    frames = problem.simulated if compared is None else compared[0]
    return {
        "simulated_energies": energy(spaced(frames[:], FRAMES)).double().numpy(),
        "simulated_torsions": problem.torsions(frames[:]),
        "energies": drawn.energies.double().numpy(),
        "torsions": problem.torsions(drawn.positions),
        "weights": torch.softmax(clipped(drawn.log_weights.double(), CLIP), 0).numpy(),
    }


def figure(data: dict[str, np.ndarray], record: dict[str, Any]) -> Any:
    """Energies on the left; φ and ψ of the simulation, of the samples, and reweighted."""
    temperature = record["settings"]["last_temperature"]
    compared = temperature if record["settings"]["ensembles"] else record["settings"]["temperature"]
    title = f"simulation, {compared:g} K"
    drawn_figure, axes = plt.subplots(1, 4, figsize=(13.5, 3.4), layout="constrained")
    reference, weights = data["simulated_energies"], data["weights"]
    edges = np.linspace(reference.min() - 5.0, np.quantile(reference, 0.999) + 15.0, 80)
    found = data["energies"].clip(max=1e6)
    axes[0].hist(reference, edges, density=True, alpha=0.4, label=title)
    axes[0].hist(found, edges, density=True, histtype="step", label="flow")
    axes[0].hist(
        found, edges, density=True, histtype="step", weights=weights, label="flow, reweighted"
    )
    axes[0].set(xlabel="u / k$_B$T", yticks=[], title=f"energy at {temperature:g} K")
    axes[0].legend(fontsize=7)
    maps = (
        (title, data["simulated_torsions"], None),
        ("flow", data["torsions"], None),
        ("reweighted", data["torsions"], weights),
    )
    for axis, (name, angles, shares) in zip(axes[1:], maps, strict=True):
        ramachandran(axis, np.degrees(angles), name, shares)
    axes[1].set_ylabel("ψ")
    return drawn_figure


COLUMNS = {
    "T (K)": lambda r: f"{r['settings']['last_temperature']:g}",
    "samples seen": lambda r: f"{r['samples_seen']:,}",
    "energies": lambda r: f"{r['energies']:,}",
    "samples": lambda r: f"{r['settings']['samples']:,}",
    "ESS": lambda r: f"{r['ess']:.1%} ± {r['ess_error']:.1%}",
    "ESS, clipped": lambda r: f"{r['ess_clipped']:.1%} ± {r['ess_clipped_error']:.1%}",
    "forward ESS": lambda r: f"{r['forward_ess']:.1%}",
    "turns averaged over": lambda r: f"{r['mean']['orders']}, {r['mean']['samples']:,} samples",
    "ESS of the mean": lambda r: f"{r['mean']['ess']:.1%} ± {r['mean']['ess_error']:.1%}",
    "ESS of the mean, clipped": lambda r: (
        f"{r['mean']['ess_clipped']:.1%} ± {r['mean']['ess_clipped_error']:.1%}"
    ),
    "forward ESS of the mean": lambda r: f"{r['mean']['forward_ess']:.1%}",
    "NLL held out": lambda r: f"{r['nll']:.2f}",
    "NLL training": lambda r: f"{r['nll_training']:.2f}",
    "KL(q‖p)": lambda r: f"{r['kl_reverse']:.3f}",
    "KL(p‖q) held out": lambda r: f"{r['kl_forward']:.3f}",
    "KL(p‖q) training": lambda r: f"{r['kl_forward_training']:.3f}",
    "φψ KL raw / reweighted / simulation": lambda r: (
        f"{r['ramachandran_raw']:.4f} / {r['ramachandran']:.4f} / "
        f"{r['ramachandran_simulation']:.4f}"
    ),
    "frames to an independent energy": lambda r: f"{r['energy_correlation']:.1f}",
    "median energy shift": lambda r: f"{r['median_shift']:+.2f}",
    "W₂ energy raw / reweighted": lambda r: (
        f"{r['energy_w2']:.2f} / {r['energy_w2_reweighted']:.2f}"
    ),
    "W₂ torus raw / reweighted / simulation": lambda r: (
        f"{r['torus_w2']:.3f} / {r['torus_w2_reweighted']:.3f} / {r['torus_w2_simulation']:.3f}"
    ),
    "ΔF (k_BT)": lambda r: f"{r['free_energy_kt']:.2f} ± {r['free_energy_kt_error']:.2f}",
    "ΔF simulation": lambda r: (
        f"{r['free_energy_simulation']:.2f} ± {r['free_energy_simulation_error']:.2f}"
    ),
    "seconds": lambda r: f"{r['seconds']:.0f}",
}
