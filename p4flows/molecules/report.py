"""The report of a generator: are the weights worth something, had the simulation converged?"""

import base64
import html
import io
import json
import logging
import math
import platform
from importlib.metadata import version
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from p4flows.molecules.energy import OpenMMEnergy
from p4flows.molecules.generator import CLIP, BoltzmannGenerator
from p4flows.molecules.reweighting import (
    WeightedSamples,
    bootstrap_error,
    clipped,
    effective_sample_size,
    forward_effective_sample_size,
    free_energy_difference,
    kl_divergences,
)
from p4flows.molecules.states import (
    States,
    peptide_states,
    state_statistics,
    torsions_of,
)
from p4flows.molecules.training import write_whole

FRAMES = 10_000  # of the simulation, where each costs an energy
# With fewer changes of state, or a larger error, populations are those of the start.
TRANSITIONS, UNCERTAIN = 20, 0.3
RARE = 2e-3  # a state with less of the simulation is not judged


class Section(NamedTuple):
    """A part of the report: paragraphs, tables (lists of rows) and figures under a heading."""

    title: str
    parts: list[str | list[list[str]] | Figure]


def write_report(generator: BoltzmannGenerator) -> dict[str, Any]:
    """Write summary.json, report.html, report.md and report.png of a generator with samples.

    Args:
        generator: after `sample`.

    Returns:
        What summary.json has.
    """
    samples, frames = generator.samples, generator.frames
    assert samples is not None and frames is not None
    trajectory = generator.molecule.trajectory(samples.positions.numpy())
    names, torsions = torsions_of(trajectory)
    replicas = [torsions_of(generator.molecule.trajectory(x.numpy()))[1] for x in frames]
    simulated = np.stack(replicas)
    energy = OpenMMEnergy(generator.molecule.system, generator.settings.simulated)
    same = torch.stack([generator.same_isomer(x) for x in frames]).numpy()
    hot = generator.settings.temperature == generator.settings.simulated
    summary: dict[str, Any] = {
        "molecule": generator.molecule.name,
        "temperature": generator.settings.temperature,
        "simulated": generator.settings.simulated,
        **_sizes(generator, samples, energy),
        **_convergence(names, simulated, same, frames, energy),
        "minutes": generator.spent(*generator.history["seconds"]),
        **{name: value for name, value in generator.history.items() if name != "seconds"},
        "seconds": dict(generator.history["seconds"]),
        "samples": len(samples.log_weights),
    }
    summary["free_energy"] = _free_energies(
        names, torsions, samples.log_weights, simulated, same, hot
    )
    spaced = frames.flatten(0, 1)[:: max(1, frames.shape[0] * frames.shape[1] // FRAMES)]
    weights = torch.softmax(clipped(samples.log_weights.double(), CLIP), 0).numpy()
    figures = {
        "ramachandran": _ramachandran(names, simulated[same], torsions, weights, generator),
        "energies": _energies(energy(spaced).numpy(), samples, weights, generator),
        "training": _training(generator),
    }
    sections = _sections(summary, figures, generator)
    title = f"Boltzmann generator of {generator.molecule.name}, {summary['temperature']:g} K"
    output = generator.output
    text = json.dumps(_finite(summary), indent=1, ensure_ascii=False)
    for file, content in (
        ("summary.json", text),
        ("report.html", _html(title, sections)),
        ("report.md", _markdown(title, sections)),
    ):
        write_whole(output / file, lambda aside, content=content: aside.write_text(content))
    for name, figure in figures.items():
        write_whole(
            output / f"report-{name}.png", lambda aside, f=figure: f.savefig(aside, dpi=150)
        )
        plt.close(figure)
    return summary


# ---------------------------------------------------------------------- numbers


def _sizes(
    generator: BoltzmannGenerator, samples: WeightedSamples, energy: OpenMMEnergy
) -> dict[str, Any]:
    """Effective sample sizes, and how far the generator is from simulation where it can be seen."""

    def clipped_size(log_weights: Tensor) -> float:
        return effective_sample_size(log_weights, clip=CLIP)

    own = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for name, size in (("ess", effective_sample_size), ("ess_clipped", clipped_size)):
        found[name] = size(samples.log_weights)
        found[f"{name}_error"] = bootstrap_error(size, samples.log_weights, generator=own)
    found |= {"forward_ess": None, "kl_held_out": None, "kl_training": None}
    if generator.settings.temperature == generator.settings.simulated:
        for name, frames in zip(("training", "held_out"), generator.split(), strict=True):
            spaced = frames[:: max(1, len(frames) // FRAMES)]
            log_weights = generator.frame_log_weights(spaced, energy)
            _, found[f"kl_{name}"] = kl_divergences(samples.log_weights, log_weights)
        found["forward_ess"] = forward_effective_sample_size(log_weights)
    return found


def _convergence(
    names: list[str], simulated: np.ndarray, same: np.ndarray, frames: Tensor, energy: OpenMMEnergy
) -> dict[str, Any]:
    """Populations by replica, transitions and correlation time; whether it is enough."""
    logging.getLogger("pymbar").setLevel(logging.ERROR)
    from pymbar.timeseries import statistical_inefficiency

    tables, reasons = {}, []
    for states in peptide_states(names):
        labels = np.where(same, states.labels(simulated), -1)
        statistics = state_statistics(labels)
        shares = [[(row == i).mean() for i in range(len(states.names))] for row in labels]
        tables[states.torsion] = {
            "states": list(states.names),
            "replicas": np.round(shares, 4).tolist(),
            "transitions": statistics.transitions,
        }
        for i, name in enumerate(states.names):
            share, error = np.mean(shares, 0)[i], np.std(shares, 0, ddof=1)[i] / len(shares) ** 0.5
            if share > RARE and share < 1.0 - RARE:
                if statistics.transitions < TRANSITIONS:
                    reasons.append(
                        f"{states.torsion} changed its state {statistics.transitions} times in all"
                    )
                elif error / share > UNCERTAIN:
                    reasons.append(
                        f"the population of {name} differs between replicas, "
                        f"{share:.1%} ± {error:.1%}"
                    )
    series = energy(frames[0][:FRAMES]).double().numpy()
    return {
        "converged": not reasons,
        "not_converged_because": list(dict.fromkeys(reasons)),
        "populations": tables,
        "frames_per_independent_energy": float(statistical_inefficiency(series)),
    }


def _free_energies(
    names: list[str],
    torsions: np.ndarray,
    log_weights: Tensor,
    simulated: np.ndarray,
    same: np.ndarray,
    hot: bool,
) -> list[dict[str, Any]]:
    """F(second) − F(first) in k_BT, where first is the more populated of the samples' states."""
    found = []
    own = torch.Generator().manual_seed(0)
    for states in peptide_states(names):
        labels = torch.from_numpy(states.labels(torsions))
        populations = [
            free_energy_difference(log_weights, torch.ones(len(labels)) > 0, labels == i)
            for i in range(len(states.names))
        ]
        first = int(np.argmin(populations))
        for second, name in enumerate(states.names):
            if second == first or not math.isfinite(populations[second]):
                continue

            def difference(weights: Tensor, where: Tensor, pair: Any = (first, second)) -> float:
                return free_energy_difference(weights, where == pair[0], where == pair[1])

            entry = {
                "states": [states.names[first], name],
                "value": difference(log_weights, labels),
                "error": bootstrap_error(difference, log_weights, labels, generator=own),
                "simulation": None,
                "simulation_error": None,
            }
            if hot:
                entry |= _simulated(states, simulated, same, first, second)
            found.append(entry)
    return found


def _simulated(
    states: States, simulated: np.ndarray, same: np.ndarray, first: int, second: int
) -> dict[str, float | None]:
    """The same difference in the simulation; its error is the scatter of the replicas."""
    labels = np.where(same, states.labels(simulated), -1)
    shares = np.stack([(labels == state).mean(1) for state in (first, second)])
    means, errors = shares.mean(1), shares.std(1, ddof=1) / math.sqrt(shares.shape[1])
    if not means.all():
        return {}
    return {
        "simulation": float(np.log(means[0] / means[1])),
        "simulation_error": float(np.hypot(*(errors / means))),
    }


def _finite(value: Any) -> Any:
    """JSON knows neither nan nor infinity."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------- figures


def _ramachandran(
    names: list[str],
    simulated: np.ndarray,
    torsions: np.ndarray,
    weights: np.ndarray,
    generator: BoltzmannGenerator,
) -> Figure:
    """−ln p of every φ, ψ pair: simulation, flow, reweighted."""
    pairs = [
        (names.index(name), names.index(name.replace("φ", "ψ")), name.split()[1])
        for name in names
        if name.startswith("φ") and name.replace("φ", "ψ") in names
    ]
    figure, axes = plt.subplots(
        max(1, len(pairs)), 3, figsize=(9.5, 3.1 * max(1, len(pairs))), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    columns = (
        (f"simulation, {generator.settings.simulated:g} K", simulated, None),
        ("flow", torsions, None),
        (f"reweighted, {generator.settings.temperature:g} K", torsions, weights),
    )
    for row, (phi, psi, residue) in zip(axes, pairs, strict=False):
        for axis, (title, angles, shares) in zip(row, columns, strict=True):
            degrees = np.degrees(angles[:, [phi, psi]])
            counts, *_ = np.histogram2d(
                *degrees.T, bins=72, range=[(-180, 180)] * 2, weights=shares
            )
            filled = np.where(counts > 0, counts, np.nan)
            image = axis.imshow(
                -np.log(filled / counts.max()).T, origin="lower", extent=(-180, 180, -180, 180),
                cmap="viridis_r", vmin=0, vmax=7,
            )  # fmt: skip
            axis.set(title=f"{residue}, {title}", xlabel="φ (°)", ylabel="ψ (°)")
            axis.set(xticks=(-180, -90, 0, 90, 180), yticks=(-180, -90, 0, 90, 180))
        figure.colorbar(image, ax=row, label="F (k$_B$T)", shrink=0.8)
    return figure


def _energies(
    simulated: np.ndarray,
    samples: WeightedSamples,
    weights: np.ndarray,
    generator: BoltzmannGenerator,
) -> Figure:
    figure, axis = plt.subplots(figsize=(6.0, 3.2), layout="constrained")
    hot, cold = generator.settings.simulated, generator.settings.temperature
    found = samples.energies.double().numpy().clip(max=1e6)
    shown = [(simulated * hot / cold, None, f"simulation, {hot:g} K")] if hot == cold else []
    shown += [(found, None, "flow"), (found, weights, f"reweighted, {cold:g} K")]
    heavy = found[weights > 0]
    low, high = np.quantile(shown[0][0] if hot == cold else heavy, [0.0, 0.99])
    edges = np.linspace(low - 5.0, high + 15.0, 80)
    for values, shares, label in shown:
        axis.hist(values, edges, density=True, weights=shares, histtype="step", label=label)
    axis.set(xlabel="u (k$_B$T)", yticks=[], title="Energies")
    axis.legend(fontsize=8)
    return figure


def _training(generator: BoltzmannGenerator) -> Figure:
    figure, axis = plt.subplots(figsize=(6.0, 3.2), layout="constrained")
    steps = [point.step for point in generator.curve]
    axis.plot(steps, [point.training for point in generator.curve], label="training frames")
    axis.plot(steps, [point.held_out for point in generator.curve], label="held-out frames")
    axis.set(xlabel="step", ylabel="−ln q (nats)", title="Training by likelihood")
    axis.legend(fontsize=8)
    return figure


# ---------------------------------------------------------------------- words


def _worth(size: float) -> str:
    """A verdict on an effective sample size."""
    if size >= 0.3:
        return "The weights are worth a lot: averages and free energies can be trusted."
    if size >= 0.05:
        return (
            "The weights are worth something: averages over common states can be used, with their "
            "errors; more minutes would help."
        )
    return (
        "The weights are not worth much: a few samples carry them. Do not use them without more "
        "minutes, and look first whether the simulation had converged."
    )


def _percent(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" + (f" ± {error:.1%}" if error is not None else "")


def _plus_minus(value: float | None, error: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ± {error:.2f}"


def _sections(
    summary: dict[str, Any], figures: dict[str, Figure], generator: BoltzmannGenerator
) -> list[Section]:
    reasons = summary["not_converged_because"]
    populations: list[list[str]] = [["state", "by replica", "transitions"]]
    for table in summary["populations"].values():
        for i, state in enumerate(table["states"]):
            shares = ", ".join(f"{replica[i]:.1%}" for replica in table["replicas"])
            populations.append([state, shares, str(table["transitions"])])
    sizes = [
        ["", "value"],
        ["effective sample size", _percent(summary["ess"], summary["ess_error"])],
        [
            "the same, largest 1e-4 of the weights clipped",
            _percent(summary["ess_clipped"], summary["ess_clipped_error"]),
        ],
        ["forward, as held-out frames see it", _percent(summary["forward_ess"])],
        ["samples", f"{summary['samples']:,}"],
    ]
    gaps = [summary["kl_training"], summary["kl_held_out"]]
    fitted: list[Any] = [figures["training"]]
    if None not in gaps:
        overfitted = gaps[1] - gaps[0] > 0.3
        fitted.insert(
            0,
            f"KL(p‖q) is {gaps[0]:.2f} nats on training frames and {gaps[1]:.2f} on held-out ones: "
            + ("it is overfitted, more frames would help." if overfitted else "no overfitting."),
        )
    free = [["states, F(second) − F(first) in k_BT", "generator", "simulation"]]
    for entry in summary["free_energy"]:
        free.append(
            [
                " → ".join(entry["states"]),
                _plus_minus(entry["value"], entry["error"]),
                _plus_minus(entry["simulation"], entry["simulation_error"]),
            ]
        )
    converged = (
        "The simulation had converged: its states interchanged often enough."
        if not reasons
        else f"The simulation had not converged: {'; '.join(reasons)}. Samples can only be right "
        "where it has been."
    )
    settings = [["setting", "value"]]
    settings += [[name, str(value)] for name, value in vars(generator.settings).items()]
    settings += [[f"minutes of {name}", f"{s / 60:.1f}"] for name, s in summary["seconds"].items()]
    settings += [
        [f"{name}", f"{summary[name]:,}"] for name in ("frames", "steps") if name in summary
    ]
    settings += [
        [f"largest change of energy when {name} turns (k_BT)", f"{change:.1e}"]
        for name, change in summary.get("rotors", {}).items()
    ]
    settings += [["Python", platform.python_version()]]
    settings += [[name, version(name)] for name in ("torch", "openmm", "mdtraj", "numpy")]
    isomers = summary.get("other_isomers", 0.0)
    return [
        Section("Are the weights worth something?", [_worth(summary["ess_clipped"]), sizes]),
        Section(
            f"Had the simulation at {summary['simulated']:g} K converged?",
            [
                converged,
                populations,
                f"One independent energy every {summary['frames_per_independent_energy']:.1f} "
                f"frames. {isomers:.1%} of the frames had a peptide bond turned between cis and "
                "trans and are left out: weights are those of the isomer that the molecule starts "
                "as.",
            ],
        ),
        Section("Free-energy differences", [free]),
        Section("Torsions and energies", [figures["ramachandran"], figures["energies"]]),
        Section("Training", fitted),
        Section("Settings and versions", [settings]),
    ]


def _markdown(title: str, sections: list[Section]) -> str:
    lines = [f"# {title}"]
    files = iter(("ramachandran", "energies", "training"))
    for section in sections:
        lines.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, str):
                lines.append(part)
            elif isinstance(part, list):
                rows = [part[0], ["---"] * len(part[0]), *part[1:]]
                lines.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
            else:
                name = next(files)
                lines.append(f"![{name}](report-{name}.png)")
    return "\n\n".join(lines) + "\n"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { border-bottom: 1px solid #ccc; padding: .2rem .8rem .2rem 0; text-align: left }
img { max-width: 100% } h2 { margin-top: 2rem }
"""


def _html(title: str, sections: list[Section]) -> str:
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, str):
                body.append(f"<p>{html.escape(part)}</p>")
            elif isinstance(part, list):
                for number, row in enumerate(part):
                    tag = "td" if number else "th"
                    cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
                    body.append(("" if number else "<table>") + f"<tr>{cells}</tr>")
                body.append("</table>")
            else:
                buffer = io.BytesIO()
                part.savefig(buffer, dpi=120)
                data = base64.b64encode(buffer.getvalue()).decode()
                body.append(f'<img alt="" src="data:image/png;base64,{data}">')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{chr(10).join(body)}</body></html>\n"
    )
