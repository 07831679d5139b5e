"""The table and the curves of learning.py, made of the records of its runs."""

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from experiment import table
from learning_contestants import CONTESTANTS, REFERENCE

Record = dict[str, Any]
# Excess of an ICA, in nats a dimension, below which sources are told apart: a layer that only
# whitens the data, whose mixtures are nearly Gaussian, stays at 0.024.
UNMIXED = 0.02
# Nats of a mean over held-out data beyond which a model has broken down: one row that a coupling
# blows up by e^40 is enough, and the mean over seeds would show nothing else.
BROKEN = 1e6
# A search over fewer rates is marked in the table.
FEWEST_RATES = 4


def last(record: Record) -> float:
    return record["curve"][-1]["value"]


def is_lost(record: Record) -> bool:
    """Whether a run diverged, or ended with a model that assigns some data no probability."""
    return record["diverged"] is not None or last(record) > BROKEN


def best_rate(records: list[Record], seed: int) -> float | None:
    """The rate at which the run with this seed ends best; None when all diverged."""
    finished = [r for r in records if r["seed"] == seed and not is_lost(r)]
    return min(finished, key=last)["rate"] if finished else None


def at_best(records: list[Record]) -> tuple[list[Record], list[float]]:
    """The runs at the best rate that did not diverge, by seed, and all rates of the search."""
    seeds = [record["seed"] for record in records]
    # The seed of the search is the one with most rates.
    seed = max(sorted(set(seeds)), key=seeds.count)
    rate = best_rate(records, seed)
    rates = sorted({record["rate"] for record in records if record["seed"] == seed})
    return [r for r in records if r["rate"] == rate and not is_lost(r)], rates


def value_at(record: Record, seconds: float) -> float:
    """The curve at a time, linear between its points; its last value beyond the end."""
    points = record["curve"]
    for before, after in itertools.pairwise(points):
        if after["cpu"] >= seconds:
            share = (seconds - before["cpu"]) / (after["cpu"] - before["cpu"])
            return before["value"] + share * (after["value"] - before["value"])
    return points[-1]["value"]


def seconds_to(record: Record, value: float) -> float:
    """When the curve comes down to a value, linear between its points; infinite if it does not."""
    points = record["curve"]
    for before, after in itertools.pairwise(points):
        if after["value"] <= value:
            share = (before["value"] - value) / (before["value"] - after["value"])
            return before["cpu"] + max(share, 0.0) * (after["cpu"] - before["cpu"])
    return math.inf


def grouped(records: list[Record]) -> dict[str, list[Record]]:
    """Records by contestant, in the order of the registry."""
    found = {
        name: [record for record in records if record["contestant"] == name] for name in CONTESTANTS
    }
    return {name: own for name, own in found.items() if own}


def spread(values: list[float], form: str) -> str:
    """Mean, and the half-width of the range where there are several."""
    text = format(statistics.mean(values), form)
    if len(values) > 1:
        text += f" ± {format((max(values) - min(values)) / 2, form.lstrip('+'))}"
    return text


def times(runs: list[Record], values: list[float]) -> str:
    """Median seconds of runs to a value each; one that does not get there takes for ever."""
    pairs = zip(runs, values, strict=True)
    found = statistics.median(seconds_to(run, value) for run, value in pairs)
    return f"{found:.1f}" if math.isfinite(found) else "–"


def row(own: list[Record], reference: list[Record], ica: bool) -> list[str]:
    """One contestant."""
    runs, rates = at_best(own)
    title = CONTESTANTS[own[0]["contestant"]].title
    failed = sum(is_lost(r) for r in own)
    diverged = f"{failed} of {len(own)}" if failed else "–"
    if not runs:
        return [title, "none", *["–"] * (6 if ica else 5), diverged]
    rate = runs[0]["rate"]
    doubts = []
    if rate in (rates[0], rates[-1]):
        doubts.append("edge")
    if len(rates) < FEWEST_RATES:
        doubts.append(f"of {len(rates)}")
    doubt = f" ({', '.join(doubts)})" if doubts else ""
    form = ".4f" if ica else ".2f"
    early = [quarter(run) for run in runs]
    steps = runs[0]["steps"]
    cells = [
        title,
        f"{rate:g}{doubt}",
        spread(early, form),
        spread([last(run) for run in runs], form),
        f"{1e3 * statistics.median(run['curve'][-1]['cpu'] / steps for run in runs):.1f}",
    ]
    if reference:
        seconds = statistics.median(run["curve"][-1]["cpu"] for run in reference)
        ends = {run["seed"]: last(run) for run in reference}
        mean = statistics.mean(ends.values())
        cells.append(spread([value_at(run, seconds) for run in runs], form))
        # Seed by seed, because runs of one seed see the same batches.
        cells.append(times(runs, [ends.get(run["seed"], mean) for run in runs]))
    else:
        cells += ["–", "–"]
    if ica:
        cells.append(times(runs, [UNMIXED] * len(runs)))
    return [*cells, diverged]


def quarter(run: Record) -> float:
    """The value at the point of the curve that is nearest to a quarter of the run."""
    points = run["curve"]
    return min(points, key=lambda point: abs(4 * point["step"] - run["steps"]))["value"]


def summary(records: list[Record]) -> list[str]:
    """The table in Markdown, with what it was measured on."""
    groups = grouped(records)
    first = records[0]
    ica = first["task"].startswith("ica")
    reference = at_best(groups[REFERENCE])[0] if REFERENCE in groups else []
    name = CONTESTANTS[REFERENCE].title
    steps = first["steps"]
    header = [
        f"{first['task']}, {first['quantity']}",
        "rate",
        f"after {steps // 4} steps",
        f"after {steps} steps",
        "CPU ms a step",
        f"at the seconds of {name}",
        f"seconds to {name}'s end",
        *([f"seconds to {UNMIXED}"] if ica else []),
        "diverged",
    ]
    rows = [row(own, reference, ica) for own in groups.values()]
    note = (
        "One thread a run. Mean ± half the range of the seeds at the best of the rates in the "
        "search; *edge* marks a best rate at the end of its grid."
    )
    return [note, table(header, rows)]


def curves(file: Path, records: list[Record]) -> None:
    """The quantity against steps and against seconds, mean of the seeds at the best rate."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    ends = []
    for index, (name, own) in enumerate(grouped(records).items()):
        runs, _ = at_best(own)
        if not runs:
            continue
        points = list(zip(*(run["curve"] for run in runs), strict=True))[1:]
        mean = [statistics.mean(p["value"] for p in point) for point in points]
        style = {
            "label": f"{CONTESTANTS[name].title}, {runs[0]['rate']:g}",
            "color": plt.get_cmap("tab20")(index % 20),
            "linestyle": "-" if name.startswith("p4") else "--",
        }
        axes[0].plot([point[0]["step"] for point in points], mean, **style)
        axes[1].plot([statistics.mean(p["cpu"] for p in point) for point in points], mean, **style)
        ends += mean
    if not ends:
        plt.close(figure)
        return
    if records[0]["task"].startswith("ica"):
        axes[0].set_yscale("log")
    else:
        low = min(ends)
        high = sorted(ends)[int(0.9 * (len(ends) - 1))]
        axes[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes[0].set(xlabel="steps", ylabel=records[0]["quantity"])
    axes[1].set(xlabel="CPU seconds of training, one thread")
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
