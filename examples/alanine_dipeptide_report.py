"""Figures of merit, figure and table of Boltzmann generators of alanine dipeptide (Figure 6)."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from experiment import cells, publish, table, there
from ramachandran import ramachandran
from torch import Tensor

NOISE = 0.004  # nm
BOOTSTRAPS = 200


def energy_numbers(energies: Tensor, reference: Tensor, seed: int) -> dict[str, Any]:
    """Shifts of mean and median in k_BT with bootstrap errors, and the low-energy fraction."""
    generator = torch.Generator().manual_seed(seed)
    numbers: dict[str, Any] = {"low_energy_fraction": (energies < reference.max()).double().mean()}
    low = energies[energies < reference.max()]
    for name, statistic, values in (
        ("median", torch.median, energies),
        ("mean", torch.mean, energies),
        ("low_energy_mean", torch.mean, low),
    ):
        resampled = torch.stack(
            [
                statistic(bootstrap(values, generator)) - statistic(bootstrap(reference, generator))
                for _ in range(BOOTSTRAPS)
            ]
        )
        numbers[f"{name}_shift"] = (statistic(values) - statistic(reference)).item()
        numbers[f"{name}_shift_error"] = resampled.std().item()
    numbers["low_energy_fraction"] = numbers["low_energy_fraction"].item()
    return numbers


def bootstrap(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randint(len(values), (len(values),), generator=generator)]


def kl_of_histograms(expected: np.ndarray, found: np.ndarray, bins: int = 72) -> float:
    """KL divergence in nats of the found distribution of an angle from the expected one."""
    # Half a count everywhere, so that an empty bin is not infinitely bad.
    counts = [np.histogram(a, bins, (-180.0, 180.0))[0] + 0.5 for a in (expected, found)]
    p, q = (c / c.sum() for c in counts)
    return float((p * np.log(p / q)).sum())


def figure(data: dict[str, np.ndarray], samples: dict[str, dict[str, np.ndarray]]) -> Any:
    """As Figure 6: energies as violins on the left, φ and ψ on the right."""
    columns = {"MD": data["energies"], f"MD + {NOISE} nm": data["noisy_energies"]}
    columns |= {title: found["energies"] for title, found in samples.items()}
    maps = {"MD": data["torsions"]}
    maps |= {title: found["torsions"] for title, found in samples.items()}
    drawn, axes = plt.subplots(
        1,
        1 + len(maps),
        figsize=(1.1 * len(columns) + 3.2 * len(maps), 3.6),
        width_ratios=[1.1 * len(columns), *[3.2] * len(maps)],
        layout="constrained",
    )
    highest = columns["MD"].max()
    window = (columns["MD"].min() - 10.0, 3.0 * highest)
    # A violin of unbounded energies would be a line: what is above the window is left out.
    parts = axes[0].violinplot(
        [values[values < window[1]] for values in columns.values()],
        showmedians=True,
        showextrema=False,
        widths=0.9,
    )
    for body, color in zip(parts["bodies"], map("C{}".format, range(len(columns))), strict=True):
        body.set(facecolor=color, alpha=0.6)
    axes[0].axhline(highest, color="grey", linestyle="--", linewidth=0.8)
    for index, values in enumerate(columns.values(), start=1):
        share = f"{(values <= highest).mean():.1%}"
        axes[0].text(index, window[0], share, ha="center", va="bottom", fontsize=8)
    names = [title.replace(" + ", " +\n") for title in columns]
    axes[0].set_xticks(range(1, len(columns) + 1), names, fontsize=8)
    axes[0].set(ylabel="u / k$_B$T", ylim=window, title="energy; share below MD's highest")
    for axis, (title, torsions) in zip(axes[1:], maps.items(), strict=True):
        ramachandran(axis, torsions, title)
    axes[1].set_ylabel("ψ")
    return drawn


COLUMNS = {
    "median shift (k_BT)": lambda r: f"{r['median_shift']:+.2f} ± {r['median_shift_error']:.2f}",
    "mean shift": lambda r: f"{r['mean_shift']:+.3g} ± {r['mean_shift_error']:.1g}",
    "mean shift below MD's highest": lambda r: (
        f"{r['low_energy_mean_shift']:+.2f} ± {r['low_energy_mean_shift_error']:.2f}"
    ),
    "low energy": lambda r: f"{r['low_energy_fraction']:.1%}",
    "NLL (nats)": lambda r: f"{r['nll']:.2f}",
    "KL φ": lambda r: f"{r['kl_phi']:.4f}",
    "KL ψ": lambda r: f"{r['kl_psi']:.4f}",
    "ESS": lambda r: f"{r['effective_sample_size']:.1%}",
    "ΔF (k_BT)": lambda r: f"{r['free_energy_kt']:.2f}",
    "round trip (nm)": lambda r: f"{r['round_trip_nm']:.1e}",
    "max AA⁻¹ − I": lambda r: f"{r['inverse_error']:.1e}",
    "s/step": lambda r: f"{r['seconds_per_step']:.3f}",
}


def draw(stem: Path, data_file: Path, files: list[Path]) -> None:
    """STEM.png and STEM.md of the record of the data and those of the models."""
    data = there([data_file], beside=".npz")[data_file]
    models = there(files, beside=".npz")
    samples = {
        record["model"]: dict(np.load(file.with_suffix(".npz"))) for file, record in models.items()
    }
    figure(dict(np.load(data_file.with_suffix(".npz"))), samples).savefig(
        stem.with_suffix(".png"), dpi=150
    )
    about = (
        f"{data['replicas']} replicas, {data['frames']} frames at {data['temperature']:g} K, "
        f"{data['cis_share']:.2%} of them cis and left out, "
        f"{data['transitions']} transitions between φ < 0 and φ > 0; ΔF of the simulation "
        f"{data['free_energy_kt']:.2f} ± {data['free_energy_error']:.2f} k_BT, share of φ > 0 "
        f"{data['populations'][1]:.4f} ± {data['population_errors'][1]:.4f}."
    )
    rows = [["MD + noise", "", *cells(data["noise"], COLUMNS)]]
    rows += [
        [record["model"], stage, *cells(record[stage], COLUMNS)]
        for record in models.values()
        for stage in ("likelihood", "mixed")
    ]
    parts = [about, table(["", "after", *COLUMNS], rows, text=2)]
    if "coordinates" in data:
        differences = (f"{name} {value:.1e}" for name, value in data["coordinates"].items())
        parts.append("Differences of bgflow's coordinates from ours: " + ", ".join(differences))
    publish(stem.with_suffix(".md"), [data, *models.values()], *parts)
    print(f"figure: {stem.with_suffix('.png')}")
