"""Linear problems (paper, Section 4.1, Appendix F, Figures 2 to 4).

    python examples/linear_problems.py --preset quick
    python examples/linear_problems.py --preset paper --workers 2

Fits a matrix to a positive definite one, to a rotation and to −I: directly, with P4Inv, through the
inverse of P4Inv, and the rotation with an OrthogonalMatrix. Writes a figure for each problem, a
table and the numbers. A finished training run is kept; an interrupted call continues with the rest,
and --figures only draws.
"""

import math
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from experiment import Record, command_line, in_processes, kept, publish, table, there
from linear_setups import PRESETS, PROBLEMS, Method, Preset, Problem
from torch import Tensor, nn

from p4flows import InvertibleMatrix, MergeBounds, MergeHook, OrthogonalMatrix
from p4flows.matrices.error import error_of_state

BATCH = 128
# Steps between looks at the loss and at the error of the inverse.
LOSS_EVERY, ERROR_EVERY = 10, 100
SNAPSHOTS = 80


class Trained:
    """The matrix in training: its parameters, what it does to rows, and what it is."""

    def __init__(self, method: Method, size: int) -> None:
        self.through_inverse = method.kind == "inverse"
        self.matrix: InvertibleMatrix | OrthogonalMatrix | None = None
        if method.kind == "direct":
            self.weight = nn.Parameter(torch.eye(size))
            self.parameters = [self.weight]
            return
        if method.kind == "orthogonal":
            self.matrix = OrthogonalMatrix(size, rank=method.rank)
        else:
            bounds = MergeBounds.paper() if method.paper_bounds else MergeBounds()
            self.matrix = InvertibleMatrix(
                size, rank=method.rank, bounds=bounds, perturbation="additive"
            )
        self.parameters = list(self.matrix.parameters())

    def __call__(self, x: Tensor) -> Tensor:
        if self.matrix is None:
            return x @ self.weight.T
        return self.matrix.solve(x) if self.through_inverse else self.matrix.multiply(x)

    def dense(self) -> Tensor:
        if self.matrix is None:
            return self.weight
        return self.matrix.inverse() if self.through_inverse else self.matrix.dense()

    def inverse_error(self) -> float:
        """Largest entry of |A A⁻¹ − I| of the perturbed matrix, in float64."""
        if self.matrix is None:
            return 0.0
        read = self.matrix.dense(), self.matrix.inverse(), *self.matrix.slogdet()
        return error_of_state(*read).right.item()


def train(problem: Problem, method: Method, preset: Preset, seed: int) -> dict[str, Any]:
    """Train until the tolerance or the last step; numbers and curves."""
    size = preset.size(problem)
    generator = torch.Generator().manual_seed(seed)
    target = problem.target(size, generator)
    torch.manual_seed(seed)
    trained = Trained(method, size)
    optimizer_class = getattr(torch.optim, method.optimizer)
    optimizer = optimizer_class(trained.parameters, lr=method.learning_rate)
    hook = None
    if trained.matrix is not None:
        hook = MergeHook(
            trained.matrix,
            optimizer,
            every=method.every,
            force_every=10,
            correct_every=50,
            paper=method.draw == "normal",
        )
    curves: dict[str, list[Any]] = {"steps": [], "losses": [], "eigenvalues": []}
    errors = []
    steps = preset.steps(problem, method)
    reached, started = None, time.perf_counter()
    for step in range(steps + 1):
        if step % LOSS_EVERY == 0:
            with torch.no_grad():
                dense = trained.dense()
                # The mean over all x ~ N(0, I) of the loss below: no noise of a batch in it.
                loss = (dense - target).square().sum().item() / size
                reached = step if loss < preset.tolerance else None
                last = reached is not None or step == steps
                if step % ERROR_EVERY == 0 or last:
                    errors.append(trained.inverse_error())
                if step % (steps // SNAPSHOTS) < LOSS_EVERY or last:
                    curves["steps"].append(step)
                    curves["losses"].append(loss)
                    curves["eigenvalues"].append(torch.linalg.eigvals(dense.double()))
            if reached is not None or not math.isfinite(loss):
                break
        x = torch.randn(BATCH, size, generator=generator)
        objective = (trained(x) - x @ target.T).square().mean()
        if method.penalty and hook is not None:
            objective = objective + hook.penalty(method.penalty)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    record: dict[str, Any] = {
        "steps": reached,
        "loss": loss,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if trained.matrix is not None and hook is not None:
        with torch.no_grad():
            sign, logabsdet = trained.matrix.slogdet()
            exact = torch.linalg.slogdet(trained.matrix.dense().double())
        record |= {
            "worst_inverse_error": max(errors),
            "inverse_error": errors[-1],
            "sign": sign.item(),
            "exact_sign": exact.sign.item(),
            "logabsdet_error": abs(logabsdet.item() - exact.logabsdet.item()),
            "merges": dict(hook.stats),
        }
    return {"record": record, "curves": curves}


def record_file(problem: str, index: int, preset: str, seed: int, output: Path) -> Path:
    name = PROBLEMS[problem].methods[index].title
    name = name.replace(", ", "_").replace(" ", "-").replace("'", "")
    return output / "runs" / f"{problem}-{preset}-{name}-{seed}.json"


def run(problem_name: str, index: int, preset_name: str, seed: int, output: Path) -> Record:
    """One training run, or what a call before has kept of it; its curves are beside the record."""
    problem, preset = PROBLEMS[problem_name], PRESETS[preset_name]
    method = problem.methods[index]
    file = record_file(problem_name, index, preset_name, seed, output)

    def make() -> Record:
        result = train(problem, method, preset, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(result["curves"], file.with_suffix(".pt"))
        about = {"problem": problem_name, "size": preset.size(problem), "method": method.title}
        return {**about, "seed": seed, **result["record"]}

    return kept(file, make)


def figure(problem: Problem, target: Tensor, curves: dict[Method, dict[str, Any]]) -> Any:
    """Losses of all methods; eigenvalues of some, from blue to yellow during training."""
    columns = 1 + len(problem.panels)
    panels, axes = plt.subplots(
        1,
        columns,
        figsize=(4.2 * columns, 5.2),
        width_ratios=[1.5, *[1] * len(problem.panels)],
        layout="constrained",
    )
    axes[0].set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for method, curve in curves.items():
        axes[0].plot(curve["steps"], curve["losses"], label=method.title)
    axes[0].set(xlabel="step", ylabel="loss", yscale="log", title=f"{problem.title}, {len(target)}")
    panels.legend(loc="outside lower center", ncols=5, fontsize="small")
    targets = torch.linalg.eigvals(target.double())
    for axis, index in zip(axes[1:], problem.panels, strict=True):
        method = problem.methods[index]
        axis.set_title(method.title, fontsize="medium")
        axis.set(xlabel="Re λ", aspect="equal")
        axis.set_adjustable("datalim")
        axis.scatter(targets.real, targets.imag, marker="s", s=30, fc="none", ec="k", lw=0.7)
        if method not in curves:
            continue
        path = torch.stack(curves[method]["eigenvalues"])
        color = torch.linspace(0, 1, len(path)).unsqueeze(-1).expand(path.shape)
        axis.scatter(path.real, path.imag, c=color, s=2, cmap="viridis")
        axis.scatter(path[-1].real, path[-1].imag, marker="x", s=14, c="r", lw=0.8)
    axes[1].set_ylabel("Im λ")
    return panels


def median_ratio(steps: dict[Method, dict[int, float]], method: Method) -> float:
    """Steps over those of direct training at the same seed, the median of seeds."""
    ratios = []
    for seed, own in steps[method].items():
        direct = steps.get(method.baseline, {}).get(seed, math.inf)
        ratios.append(own / direct if math.isfinite(direct) else math.inf)
    return statistics.median(ratios)


def rows(problem: Problem, runs: dict[Method, list[Record]]) -> list[list[str]]:
    """The table of one problem; the worst of all seeds where errors are concerned."""
    steps = {
        method: {r["seed"]: math.inf if r["steps"] is None else r["steps"] for r in records}
        for method, records in runs.items()
    }
    lines = []
    for method, records in runs.items():
        median = statistics.median(steps[method].values())
        ratio = median_ratio(steps, method)
        cells = [
            f"{problem.title}, {records[0]['size']}",
            method.title,
            f"{median:.0f}" if math.isfinite(median) else "not reached",
            f"{ratio:.2f}" if math.isfinite(ratio) else "–",
            f"{max(record['loss'] for record in records):.1e}",
        ]
        if method.kind == "direct":
            cells += ["–"] * 5
        else:
            cells += [
                f"{max(record['worst_inverse_error'] for record in records):.0e}",
                f"{max(record['inverse_error'] for record in records):.0e}",
                " ".join(f"{record['sign']:+.0f}/{record['exact_sign']:+.0f}" for record in records)
                if len(records) == 1
                else f"{sum(record['sign'] == record['exact_sign'] for record in records)}"
                f"/{len(records)} right",
                f"{max(record['logabsdet_error'] for record in records):.0e}",
                "/".join(
                    f"{statistics.median(record['merges'][key] for record in records):.0f}"
                    for key in ("merged", "skipped", "forced")
                ),
            ]
        cells.append(f"{statistics.median(record['seconds'] for record in records):.0f}")
        lines.append(cells)
    return lines


HEADER = [
    *("problem", "method", "steps", "ratio to direct", "final loss", "worst error of the inverse"),
    *("at the end", "sign, exact", "logabsdet error", "merged/skipped/forced", "seconds"),
]


def main() -> None:
    """Train what is missing, then write figures and table of what is there."""
    parser = command_line(__doc__, "results/linear_problems", PRESETS, seed=False)
    parser.add_argument("--problem", choices=sorted(PROBLEMS), action="append")
    arguments = parser.parse_args()
    output, preset = arguments.output, PRESETS[arguments.preset]
    names = arguments.problem or list(PROBLEMS)
    jobs = [
        (name, index, arguments.preset, seed, output)
        for name in names
        for index in range(len(PROBLEMS[name].methods))
        for seed in range(min(preset.seeds, PROBLEMS[name].seeds))
    ]
    if not arguments.figures:
        # The longest runs, those of large matrices, first.
        longest_first = sorted(jobs, key=lambda job: -PROBLEMS[job[0]].size)
        in_processes(run, longest_first, arguments.workers)

    found = there((record_file(*job) for job in jobs), beside=".pt")
    lines = []
    for name in names:
        problem = PROBLEMS[name]
        runs: dict[Method, list[Record]] = {}
        curves = {}
        for job in jobs:
            if job[0] == name and record_file(*job) in found:
                method = problem.methods[job[1]]
                runs.setdefault(method, []).append(found[record_file(*job)])
                if job[3] == 0:
                    curves[method] = torch.load(record_file(*job).with_suffix(".pt"))
        if not runs:
            continue
        lines += rows(problem, runs)
        target = problem.target(preset.size(problem), torch.Generator().manual_seed(0))
        file = output / f"{name}-{arguments.preset}.png"
        figure(problem, target, curves).savefig(file, dpi=100)
        print(f"figure: {file}")
    numbers = table(HEADER, lines, text=2)
    publish(output / f"linear_problems-{arguments.preset}.md", list(found.values()), numbers)


if __name__ == "__main__":
    main()
