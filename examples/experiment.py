"""What experiments share: records that are kept, processes, tables that say where they come from.

A run writes what its figure needs and then its record: where a record is, all else is. Tables and
figures are made of these files, so that `--figures` makes them again without a run.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

Record = dict[str, Any]


def kept(file: Path, make: Callable[[], Record]) -> Record:
    """The record in a JSON file; where there is none, what `make` returns, with its environment."""
    if read(file) is None:
        record = make() | {"environment": environment()}
        write(file, json.dumps(record, indent=1))
    return json.loads(file.read_text())


def read(file: Path) -> Record | None:
    """The record in a file; None where there is no file, or one from before records said whence."""
    record = json.loads(file.read_text()) if file.exists() else {}
    return record if "environment" in record else None


def there(files: Iterable[Path], beside: str = ".json") -> dict[Path, Record]:
    """Records by file, of those with a file beside them that has this suffix.

    What is missing is named, and without any record the script ends.
    """
    found, missing = {}, []
    for file in files:
        record = read(file)
        if record is not None and file.with_suffix(beside).exists():
            found[file] = record
        else:
            missing.append(f"missing: {file if record is None else file.with_suffix(beside)}")
    if not found:
        raise SystemExit("\n".join([*missing, "nothing to draw: without --figures, it is made"]))
    print("\n".join(missing), end="\n" if missing else "", file=sys.stderr)
    return found


def write(file: Path, text: str) -> None:
    """A text file, written aside and moved, so that a kill leaves no half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}.part")
    aside.write_text(text.rstrip("\n") + "\n")
    os.replace(aside, file)


def environment() -> Record:
    """Command, commit, torch, processor, threads, and the load that other processes made."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def publish(file: Path, records: Sequence[Record], *parts: str) -> None:
    """A Markdown file of where the records come from and of what was made of them; printed too."""
    text = "\n\n".join([provenance(records), *parts])
    write(file, text)
    print(text)


def provenance(records: Sequence[Record]) -> str:
    """A line on where the records come from: commands, seeds, commits, torch, machine, load."""

    def each(name: str, form: str = "{}") -> str:
        values = dict.fromkeys(record["environment"][name] for record in records)
        return ", ".join(form.format(value) for value in values)

    seeds = sorted({record["seed"] for record in records if "seed" in record})
    named = f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""
    loads = [record["environment"]["load_average"] for record in records]
    return (
        f"{each('command', '`{}`')}{named}; commit {each('commit')}, torch {each('torch')}, "
        f"threads: {each('threads')} on {each('cores')} cores ({each('cpu')}), load average "
        + "–".join(f"{load:g}" for load in dict.fromkeys((min(loads), max(loads))))
        + " at the end."
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A Markdown table, its first `text` columns to the left and the others to the right."""
    rule = ["---"] * text + ["---:"] * (len(header) - text)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def cells(record: Record, columns: dict[str, Callable[[Record], str]]) -> list[str]:
    """A row of a table, by the text of each column; a dash where the record has no such number."""

    def cell(form: Callable[[Record], str]) -> str:
        try:
            return form(record)
        except (KeyError, TypeError):
            return "–"

    return [cell(form) for form in columns.values()]


def in_processes(run: Callable[..., Any], jobs: Sequence[tuple], workers: int) -> list[Any]:
    """`run(*job)` of each job, in their order, in processes of one thread each; one worker is here.

    Small models keep no more than one core busy. The first job that fails ends the others that have
    not begun, and its error is raised.
    """
    if workers == 1:
        torch.set_num_threads(1)
        return [run(*job) for job in tqdm(jobs, desc="runs")]
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        futures = [pool.submit(run, *job) for job in jobs]
        try:
            finished = concurrent.futures.as_completed(futures)
            for future in tqdm(finished, total=len(jobs), desc="runs"):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def command_line(
    about: str | None,
    output: str,
    presets: Iterable[str] = (),
    seed: bool = True,
    pool: bool = True,
) -> argparse.ArgumentParser:
    """What the command lines of the scripts have in common: with presets, a seed, a pool or not."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=raw)
    if presets:
        parser.add_argument("--preset", choices=sorted(presets), default="quick")
    if seed:
        parser.add_argument("--seed", type=int, default=0)
    if pool:
        parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument(
        "--figures", action="store_true", help="run nothing: tables and figures of what is there"
    )
    return parser
