"""The report of a generator: are the weights worth something, had the simulation converged?"""

import base64
import html
import io
import json
import logging
import math
import platform
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from p4flows.molecules.energy import OpenMMEnergy
from p4flows.molecules.generator import CLIP, OVERFITTED, BoltzmannGenerator
from p4flows.molecules.reweighting import (
    bootstrap_error,
    clipped,
    effective_sample_size,
    forward_effective_sample_size,
    free_energy_difference,
    kl_divergences,
)
from p4flows.molecules.states import peptide_states, state_statistics, torsions_of
from p4flows.molecules.storage import write_whole

_FRAMES = 10_000  # of the simulation, where each costs an energy
# With fewer changes of state, or a larger relative error, populations are those of the start.
_TRANSITIONS, _UNCERTAIN = 50, 0.2
_RARE = 2e-3  # a state with a smaller share is not judged


class _Section(NamedTuple):
    """A part of the report: paragraphs, tables (lists of rows) and figures under a heading."""

    title: str
    parts: list[str | list[list[str]] | Figure]


def write_report(generator: BoltzmannGenerator) -> dict[str, Any]:
    """Write summary.json, report.html, report.md and its figures of a generator with samples.

    Args:
        generator: after `sample`.

    Returns:
        What summary.json has.
    """
    data = _Data(generator)
    settings = generator.settings
    summary: dict[str, Any] = {
        "molecule": generator.molecule.name,
        "temperature": settings.temperature,
        "simulated": settings.simulated,
        **_sizes(data),
        "minutes": generator.spent(),
        **generator.history,
        "samples": len(data.log_weights),
        "free_energy": _free_energies(data),
        **_convergence(data),
    }
    figures = {
        "ramachandran": _ramachandran(data),
        "energies": _energies(data),
        "training": _training(generator),
    }
    title = f"Boltzmann generator of {generator.molecule.name}, {settings.temperature:g} K"
    sections = _sections(summary, figures, generator)
    texts = {
        "summary.json": json.dumps(_finite(summary), indent=1, ensure_ascii=False),
        "report.html": _html(title, sections),
        "report.md": _markdown(title, sections, list(figures)),
    }
    for file, text in texts.items():
        write_whole(generator.output / file, partial(_write_text, text=text))
    for name, figure in figures.items():
        write_whole(generator.output / f"report-{name}.png", partial(figure.savefig, dpi=150))
        plt.close(figure)
    return summary


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


class _Data:
    """What all parts of the report are made of."""

    def __init__(self, generator: BoltzmannGenerator) -> None:
        self.generator, frames = generator, generator.frames
        self.cold = generator.settings.temperature < generator.settings.simulated
        self.energy = OpenMMEnergy(generator.molecule.system, generator.settings.simulated)
        self.log_weights = generator.samples.log_weights
        self.weights = torch.softmax(clipped(self.log_weights.double(), CLIP), 0).numpy()
        self.names, self.torsions = self._torsions(generator.samples.positions)
        # Of the replicas, and which of their frames count.
        self.simulated = np.stack([self._torsions(replica)[1] for replica in frames])
        self.counts = torch.stack([generator.same_isomer(replica) for replica in frames]).numpy()
        self.states = peptide_states(self.names)

    def _torsions(self, positions: Tensor) -> tuple[list[str], np.ndarray]:
        return torsions_of(self.generator.molecule.trajectory(positions.numpy()))


def _spaced(frames: Tensor) -> Tensor:
    return frames[:: max(1, len(frames) // _FRAMES)]


# ---------------------------------------------------------------------- numbers


def _sizes(data: _Data) -> dict[str, Any]:
    """Effective sample sizes, and the divergence from frames where there are any to compare."""

    def clipped_size(log_weights: Tensor) -> float:
        return effective_sample_size(log_weights, clip=CLIP)

    draws = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"forward_ess": None, "kl_training": None, "kl_held_out": None}
    for name, size in (("ess", effective_sample_size), ("ess_clipped", clipped_size)):
        found[name] = size(data.log_weights)
        found[f"{name}_error"] = bootstrap_error(size, data.log_weights, generator=draws)
    if not data.cold:
        training, held_out = map(_spaced, data.generator.split())
        for name, frames in (("kl_training", training), ("kl_held_out", held_out)):
            log_weights = data.generator.frame_log_weights(frames)
            _, found[name] = kl_divergences(data.log_weights, log_weights)
        found["forward_ess"] = forward_effective_sample_size(log_weights)
    return found


def _convergence(data: _Data) -> dict[str, Any]:
    """Populations by replica, transitions and correlation time; whether it is enough."""
    # It warns of series that are too short, which the transitions tell.
    logging.getLogger("pymbar").setLevel(logging.ERROR)
    from pymbar.timeseries import statistical_inefficiency

    tables, reasons = {}, []
    for states in data.states:
        labels = np.where(data.counts, states.labels(data.simulated), -1)
        _, _, transitions = state_statistics(labels)
        shares = np.stack([(labels == i).mean(1) for i in range(len(states.names))], 1)
        errors = shares.std(0, ddof=1) / math.sqrt(len(shares))
        tables[states.torsion] = {
            "states": list(states.names),
            "replicas": shares.round(4).tolist(),
            "transitions": transitions,
        }
        for name, share, error in zip(states.names, shares.mean(0), errors, strict=True):
            if _RARE < share < 1.0 - _RARE and transitions < _TRANSITIONS:
                reasons.append(f"{states.torsion} changed its state {transitions} times in all")
            elif _RARE < share < 1.0 - _RARE and error > _UNCERTAIN * share:
                reasons.append(f"replicas differ in the share of {name}, {share:.1%} ± {error:.1%}")
    series = data.energy(data.generator.frames[0][:_FRAMES]).double().numpy()
    return {
        "converged": not reasons,
        "not_converged_because": list(dict.fromkeys(reasons)),
        "populations": tables,
        "frames_per_independent_energy": float(statistical_inefficiency(series)),
        "other_isomers": 1.0 - float(data.counts.mean()),
    }


def _free_energies(data: _Data) -> list[dict[str, Any]]:
    """F(second) − F(first) in k_BT, where the first is the most populated of the states."""
    found = []
    draws = torch.Generator().manual_seed(0)
    for states in data.states:
        labels = torch.from_numpy(states.labels(data.torsions))
        shares = np.bincount(labels, data.weights, len(states.names))
        replicas = np.where(data.counts, states.labels(data.simulated), -1)
        first = int(shares.argmax())
        for second, name in enumerate(states.names):
            if second == first or not shares[second] > 0:
                continue

            def difference(weights: Tensor, where: Tensor, other: int = second) -> float:
                return free_energy_difference(weights, where == first, where == other)  # noqa: B023

            entry: dict[str, Any] = {
                "states": [states.names[first], name],
                "value": difference(data.log_weights, labels),
                "error": bootstrap_error(difference, data.log_weights, labels, generator=draws),
                "simulation": None,
                "simulation_error": None,
            }
            pair = np.stack([(replicas == state).mean(1) for state in (first, second)])
            means, errors = pair.mean(1), pair.std(1, ddof=1) / math.sqrt(pair.shape[1])
            if not data.cold and means.all():
                entry["simulation"] = math.log(means[0] / means[1])
                entry["simulation_error"] = math.hypot(*(errors / means))
            found.append(entry)
    return found


def _finite(value: Any) -> Any:
    """JSON knows neither nan nor infinity."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------- figures


def _ramachandran(data: _Data) -> Figure:
    """−ln p of every φ, ψ pair: simulation, flow, reweighted."""
    settings, names = data.generator.settings, data.names
    pairs = [(n, n.replace("φ", "ψ")) for n in names if n.startswith("φ")]
    pairs = [(phi, psi) for phi, psi in pairs if psi in names]
    rows = max(1, len(pairs))
    figure, axes = plt.subplots(
        rows, 3, figsize=(9.5, 3.1 * rows), layout="constrained", squeeze=False
    )
    columns: list[tuple[str, np.ndarray, Any]] = [
        (f"simulation, {settings.simulated:g} K", data.simulated[data.counts], None),
        ("flow", data.torsions, None),
        (f"reweighted, {settings.temperature:g} K", data.torsions, data.weights),
    ]
    edges, ticks = np.linspace(-180.0, 180.0, 73), (-180, -90, 0, 90, 180)
    for row, (phi, psi) in zip(axes, pairs, strict=False):
        for axis, (title, torsions, weights) in zip(row, columns, strict=True):
            x, y = (np.degrees(torsions[:, names.index(name)]) for name in (phi, psi))
            counts, *_ = np.histogram2d(x, y, bins=(edges, edges), weights=weights)
            free = -np.log(np.where(counts > 0, counts, np.nan) / counts.max())
            image = axis.pcolormesh(edges, edges, free.T, cmap="viridis_r", vmin=0, vmax=7)
            axis.set(title=f"{phi.split()[1]}, {title}", xticks=ticks, yticks=ticks, aspect=1)
            axis.set(xlabel="φ (°)", ylabel="ψ (°)")
        figure.colorbar(image, ax=row, label="F (k$_B$T)", shrink=0.8)
    return figure


def _energies(data: _Data) -> Figure:
    figure, axis = plt.subplots(figsize=(6.0, 3.2), layout="constrained")
    settings = data.generator.settings
    found = data.generator.samples.energies.double().numpy().clip(max=1e6)
    heavy = found[np.random.default_rng(0).choice(len(found), len(found), p=data.weights)]
    edges = np.linspace(heavy.min() - 5.0, np.quantile(heavy, 0.99) + 15.0, 80)
    shown = [(found, "flow"), (heavy, f"reweighted, {settings.temperature:g} K")]
    if not data.cold:
        simulated = data.energy(_spaced(data.generator.frames.flatten(0, 1))).numpy()
        shown.insert(0, (simulated, f"simulation, {settings.simulated:g} K"))
    for values, label in shown:
        axis.hist(values, list(edges), density=True, histtype="step", label=label)
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
        return "Yes: averages and free energies over the states that were visited can be trusted."
    if size >= 0.05:
        return "In part: averages can be used with their errors; more minutes would help."
    return "No: a few samples carry all the weight. Take more minutes before you use them."


def _plus_minus(value: float | None, error: float | None = None, form: str = ".1%") -> str:
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _sections(
    summary: dict[str, Any], figures: dict[str, Figure], generator: BoltzmannGenerator
) -> list[_Section]:
    """The parts of the report, in the order of what a chemist asks."""
    sizes = [
        ["", "share of the samples"],
        ["effective sample size", _plus_minus(summary["ess"], summary["ess_error"])],
        [
            "the same with the largest 1e-4 of the weights clipped",
            _plus_minus(summary["ess_clipped"], summary["ess_clipped_error"]),
        ],
        ["the same as held-out frames see it (forward)", _plus_minus(summary["forward_ess"])],
    ]
    converged = "Yes: its states interchanged often enough."
    if not summary["converged"]:
        converged = (
            f"No: {'; '.join(summary['not_converged_because'])}. Samples can only be right where "
            "the simulation has been, and their weights do not show what it missed."
        )
    populations = [["state", "share in each replica", "transitions"]]
    for table in summary["populations"].values():
        for i, state in enumerate(table["states"]):
            shares = ", ".join(f"{replica[i]:.1%}" for replica in table["replicas"])
            populations.append([state, shares, str(table["transitions"])])
    correlation = (
        f"{summary['frames_per_independent_energy']:.1f} frames make one independent energy. "
        f"{summary['other_isomers']:.1%} of the frames had a peptide bond turned between cis and "
        "trans and are left out: all weights are those of the isomer that the molecule starts as."
    )
    free = [["states, F(second) − F(first) in k_BT", "generator", "simulation"]]
    for entry in summary["free_energy"]:
        own = _plus_minus(entry["value"], entry["error"], ".2f")
        other = _plus_minus(entry["simulation"], entry["simulation_error"], ".2f")
        free.append([" → ".join(entry["states"]), own, other])
    fit = [p for p in ("kl_training", "kl_held_out") if summary[p] is not None]
    fitted = ""
    if fit:
        seen, unseen = (summary[name] for name in fit)
        fitted = f"KL(p‖q) is {seen:.2f} nats on training and {unseen:.2f} on held-out frames: " + (
            "overfitted, more frames would help."
            if unseen - seen > OVERFITTED
            else "not overfitted."
        )
    settings = [["setting", "value"], *([n, str(v)] for n, v in vars(generator.settings).items())]
    settings += [[f"minutes of {n}", f"{s / 60:.1f}"] for n, s in summary["seconds"].items()]
    settings += [[n, f"{summary[n]:,}"] for n in ("frames", "steps", "samples") if n in summary]
    for name, change in summary.get("rotors", {}).items():
        settings.append([f"change of energy when {name} turns (k_BT)", f"{change:.0e}"])
    settings += [[f"round {i + 1}", f"{t:.0f} K, effective sample size before it {size:.1%}"]
                 for i, (t, size, _) in enumerate(summary.get("rounds", []))]  # fmt: skip
    packages = ("torch", "nflows", "openmm", "mdtraj", "numpy")
    settings += [["Python", platform.python_version()], *([n, version(n)] for n in packages)]
    return [
        _Section("Are the weights worth something?", [_worth(summary["ess_clipped"]), sizes]),
        _Section(
            f"Had the simulation at {summary['simulated']:g} K converged?",
            [converged, populations, correlation],
        ),
        _Section("Free-energy differences", [free]),
        _Section("Torsions and energies", [figures["ramachandran"], figures["energies"]]),
        _Section("Training", [fitted, figures["training"]]),
        _Section("Settings and versions", [settings]),
    ]


def _markdown(title: str, sections: list[_Section], figures: list[str]) -> str:
    blocks, names = [f"# {title}"], iter(figures)
    for section in sections:
        blocks.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, str):
                blocks.append(part)
            elif isinstance(part, list):
                rows = [part[0], ["---"] * len(part[0]), *part[1:]]
                blocks.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
            else:
                name = next(names)
                blocks.append(f"![{name}](report-{name}.png)")
    return "\n\n".join(block for block in blocks if block) + "\n"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { border-bottom: 1px solid #ccc; padding: .2rem .8rem .2rem 0; text-align: left }
img { max-width: 100% } h2 { margin-top: 2rem }
"""


def _html(title: str, sections: list[_Section]) -> str:
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, str):
                body.append(f"<p>{html.escape(part)}</p>")
            elif isinstance(part, list):
                tags = ["th", *["td"] * (len(part) - 1)]
                cells = (
                    "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
                    for tag, row in zip(tags, part, strict=True)
                )
                body.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
            else:
                buffer = io.BytesIO()
                part.savefig(buffer, dpi=120)
                image = base64.b64encode(buffer.getvalue()).decode()
                body.append(f'<img alt="" src="data:image/png;base64,{image}">')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
