"""What may go wrong with the numbers, tried for ten minutes: the table of docs/promises.md.

    python benchmarks/stress.py            # or: make stress
    python benchmarks/stress.py --quick    # seconds

Each row is a check with its worst number and what is allowed; the exit status is 1 if one fails.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from report import measured, table
from stress_faults import compiled, faults_of_fit, interrupted_merges, killed_fits, stale_backward
from torch import Tensor
from tqdm.auto import tqdm

from p4flows.matrices import InvertibleMatrix
from p4flows.matrices.error import CONDITION_EPS, LOGABSDET, RATIO, error_of_state
from p4flows.matrices.merge import merge_together

KINDS = ("relative", "additive")
CORRECT_EVERY = 50


class Row(NamedTuple):
    check: str
    cases: int
    worst: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.worst <= self.allowed  # False for NaN


def conditioned(size: int, condition: float, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(noise).Q
    return ((left * torch.logspace(0, -math.log10(condition), size)) @ right).to(dtype)


def corrections(quick: bool) -> Iterator[Row | None]:
    """Both residuals after a correction of a spoilt inverse, as multiples of those of LU."""
    for dtype in (torch.float32, torch.float64):
        worst, cases = 0.0, 0
        for exponent in range(1, 7):
            for seed in range(2 if quick else 40):
                a = conditioned(64, 10.0**exponent, dtype, seed)
                exact = torch.linalg.inv(a.double())
                sign, logabsdet = torch.linalg.slogdet(a.double())
                by_lu = error_of_state(a, exact.to(dtype), sign, logabsdet)
                noise = torch.randn(64, 64, dtype=torch.float64) * 1e-3
                # Not through the constructor, which refuses what the dtype cannot carry.
                matrix = InvertibleMatrix(64, init=torch.eye(64, dtype=dtype))
                matrix.frozen.copy_(a)
                matrix.inverse_frozen.copy_(exact @ (torch.eye(64) + noise))
                matrix.correct()
                error = matrix.error()
                quotients = (error.right / by_lu.right, error.left / by_lu.left, error.ratio / 10)
                worst, cases = max(worst, *(q.item() for q in quotients)), cases + 1
                yield None
        yield Row(f"correction against LU, {dtype}, cond 1e1–1e6, multiple", cases, worst, 10.0)


def drift(size: int, merges: int, batch: int) -> Iterator[Row | None]:
    """Random merges of all sizes that the bounds allow, measured just before corrections."""
    ranks = sorted({1, min(4, size), max(1, size // 4)})
    ratios, logabsdets, signs, warned, done = 0.0, 0.0, 0, 0, 0
    rounds = max(CORRECT_EVERY, merges // (batch * len(ranks) * len(KINDS)))
    for kind in KINDS:
        for rank in ranks:
            generator = torch.Generator().manual_seed(rank)
            shape = (batch, size, size)
            start = torch.eye(size) + 0.3 * size**-0.5 * torch.randn(shape, generator=generator)
            matrix = InvertibleMatrix(
                size, batch_shape=(batch,), rank=rank, init=start, perturbation=kind
            )
            for merge in range(1, rounds + 1):
                scale = 10 ** (2 * torch.rand(batch, 1, 1, generator=generator) - 2)
                noise = torch.randn(matrix.u.shape, generator=generator)
                matrix.u.data.copy_(scale * size**-0.5 * noise)
                last = merge % CORRECT_EVERY == 0
                outcome = merge_together([matrix], False).outcome
                done += int(outcome.merged.sum())
                if last:
                    error = matrix.error()
                    eps = torch.finfo(torch.float32).eps
                    carried = error.condition * eps < CONDITION_EPS
                    warned += int((~carried).sum())
                    allowed = eps * (size * error.condition).clamp(min=100.0 / LOGABSDET)
                    ratios = max(ratios, torch.where(carried, error.ratio, 0.0).max().item())
                    quotient = torch.where(carried, error.logabsdet / allowed, 0.0)
                    logabsdets = max(logabsdets, quotient.max().item())
                    signs += int((error.wrong_sign & carried).sum())
                    matrix.correct()
                    # A walk without end has no condition number that a dtype could carry.
                    if merge % (10 * CORRECT_EVERY) == 0:
                        matrix.assign(start)
                yield None
    name = f"drift at n = {size}, ranks {', '.join(map(str, ranks))}"
    yield Row(f"{name}: LAPACK ratio before corrections", done, ratios, RATIO)
    yield Row(f"{name}: log-determinant / (n·eps·cond)", done, logabsdets, LOGABSDET)
    yield Row(f"{name}: wrong signs", done, signs, 0)
    print(f"n = {size}: {warned} measurements beyond the dtype, of which a hook warns")


def spiteful(kind: int, u: Tensor, v: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of ten ways to spoil factors of shape (batch, n, k)."""
    batch, n, k = u.shape
    where = torch.randint(n * k, (batch,), generator=generator)
    spike = torch.zeros(batch, n * k).scatter_(1, where[:, None], 1.0).reshape(u.shape)
    # For k = 2 and A near I, G = I + vᵀu is all that matters.
    basis = torch.eye(n, k).expand(batch, n, k)
    stretch = torch.diag(torch.tensor([1e5, 1e-5])) - torch.eye(2)
    return [
        lambda: (u, v),
        lambda: (torch.where(spike > 0, torch.nan, u), v),
        lambda: (u, torch.where(spike > 0, torch.inf, v)),
        lambda: (u * 1e30, v),
        lambda: (u * 1e-30, v * 1e30),
        lambda: (u * 1e30, v * 1e30),
        lambda: (-basis, basis),
        lambda: (basis @ stretch, basis),
        lambda: (u + 1e6 * spike, v),
        lambda: (u * 1e10, v),
    ][kind]()


def adversarial(cases: int) -> Iterator[Row | None]:
    """Spoilt u and v: no merge that was accepted is wrong, no other one changes anything."""
    wrong = changed = accepted = 0
    batch = 100
    for index in range(cases // batch):
        kind, way, force = KINDS[index % 2], (index // 2) % 10, bool(index % 3)
        generator = torch.Generator().manual_seed(index)
        start = torch.eye(8) + 0.1 * torch.randn(batch, 8, 8, generator=generator)
        matrix = InvertibleMatrix(8, batch_shape=(batch,), rank=2, init=start, perturbation=kind)
        u, v = torch.randn(2, batch, 8, 2, generator=generator)
        u, v = spiteful(way, u, v, generator)
        matrix.u.data.copy_(u)
        matrix.v.data.copy_(v)
        before = {name: buffer.clone() for name, buffer in matrix.named_buffers()}
        report = merge_together([matrix], force)
        merged = report.outcome.merged
        right = matrix.error().is_right(8, torch.float32)
        carried = report.condition * torch.finfo(torch.float32).eps < CONDITION_EPS
        wrong += int((merged & carried & ~right).sum())
        accepted += int(merged.sum())
        for name in ("frozen", "inverse_frozen", "sign", "logabsdet_frozen"):
            same = (getattr(matrix, name) == before[name]).reshape(batch, -1).all(-1)
            changed += int((~merged & ~same).sum())
        if force:
            changed += int((~merged & matrix.u.reshape(batch, -1).any(-1)).sum())
        yield None
    yield Row(f"adversarial u, v: wrong merges of {accepted} accepted", cases, wrong, 0)
    yield Row(
        "adversarial u, v: refused, and yet changed (or not reset by force)", cases, changed, 0
    )


def resident() -> int:
    """Bytes that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def memory(merges: int) -> Iterator[Row | None]:
    """What the process grows by in many merges, in MiB."""
    matrix = InvertibleMatrix(64)
    before = 0
    for merge in range(merges):
        if merge == merges // 10:
            before = resident()
        matrix.u.data.normal_(std=1e-3)
        merge_together([matrix], False, merge % CORRECT_EVERY == 0)
        yield None
    yield Row("memory in merges, MiB", merges, (resident() - before) / 2**20, 4.0)


def checks(quick: bool, merges: int) -> list[Iterator[Row | None]]:
    few = 1 if quick else 10
    found = [
        corrections(quick),
        drift(2, 6_000 if quick else merges, 20 if quick else 1000),
        drift(64, 1_500 if quick else merges, 5 if quick else 100),
        adversarial(2_000 if quick else 20_000),
        interrupted_merges(20 * few),
        faults_of_fit(),
        killed_fits(2 * few),
        stale_backward(),
    ]
    if not quick:
        found.append(drift(512, 2_000, 1))
        found.append(memory(10_000))
        found.append(compiled("aot_eager"))
        if shutil.which("c++") or shutil.which("g++"):
            found.append(compiled("inductor"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a slice of seconds")
    parser.add_argument("--merges", type=int, default=1_000_000, help="at n = 2 and at 64")
    parser.add_argument("--json", type=Path, help="file that takes the numbers as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    begin, rows = time.perf_counter(), []
    for check in tqdm(checks(arguments.quick, arguments.merges), unit="check"):
        for result in tqdm(check, desc=check.__name__, unit="case", leave=False):
            if result is not None:
                rows.append(Row(*result))
    verdicts = ["passed" if row.passed else "FAILED" for row in rows]
    cells = [
        [row.check, f"{row.cases:,}", f"{row.worst:.3g}", f"{row.allowed:g}", verdict]
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    print("\n" + table(["check", "cases", "worst", "allowed", ""], cells))
    seconds = time.perf_counter() - begin
    print(f"\n{measured()} {seconds:.0f} s.")
    if arguments.json:
        arguments.json.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")
    if not all(row.passed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
