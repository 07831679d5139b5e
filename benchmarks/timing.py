"""Timing of contestants side by side: the loop that the benchmark scripts share."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

# A round of a contestant lasts at least this long, so that the clock and the first call after
# another contestant, with its memory out of the cache, do not weigh in.
ROUND_SECONDS = 0.02
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call over the rounds: the median and the quartiles around it."""

    median: float
    low: float
    high: float


def interleaved(
    contestants: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    title: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions round robin, so that whatever else the machine does hits all of them alike.

    Args:
        contestants: functions without arguments by name.
        rounds: how often each has its turn; a turn is as many calls as fill `ROUND_SECONDS`.
        title: of the progress bar.
        clock: `time.process_time` counts processor time, which on one thread is what the wall
            clock shows on a machine without other work.

    Returns:
        The timing of one call of each.
    """
    calls = {}
    for name, run in contestants.items():
        run()
        calls[name] = math.ceil(ROUND_SECONDS / _seconds(run, 2, clock))
    rows: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in tqdm(range(rounds), desc=title, leave=False):
        for name, run in contestants.items():
            rows[name].append(_seconds(run, calls[name], clock))
    return {name: _timing(row) for name, row in rows.items()}


def _seconds(run: Callable[[], Any], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls


def _timing(row: list[float]) -> Timing:
    if len(row) == 1:
        return Timing(row[0], row[0], row[0])
    low, median, high = statistics.quantiles(row, n=4, method="inclusive")
    return Timing(median, low, high)
