"""``avmp bench paper``: the paper's grid, reproduced and then corrected."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from avmp_vllm.bench import results
from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.paper import compare, honest, published, report
from avmp_vllm.bench.paper.allocators import make_allocator
from avmp_vllm.bench.paper.models import MODELS
from avmp_vllm.bench.paper.replay import replay
from avmp_vllm.bench.paper.sweeps import DEFAULT_SWEEPS, GIB, SWEEPS, Cell, Sweep, replays
from avmp_vllm.bench.paper.workloads import (
    SHAREGPT,
    SHAREGPT_FILE,
    SYNTHETIC,
    Trace,
    make_trace,
    read_sharegpt_counts,
)
from avmp_vllm.bench.statistics import SEED

BENCHMARK = "paper"
PARTS = ("reproduce", "correct")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--published",
        type=Path,
        metavar="DIR",
        help="folder of the published tables to compare with "
        f"(default: {published.DEFAULT_FOLDER} if it exists; else nothing is compared)",
    )
    parser.add_argument(
        "--sharegpt",
        type=Path,
        metavar="FILE",
        help=f"ordered ShareGPT prompt lengths (default: {SHAREGPT_FILE} in the folder of the "
        "published tables; without it the ShareGPT cells are left out)",
    )
    parser.add_argument("--part", choices=PARTS, help="only one part (default: both)")
    parser.add_argument(
        "--sweep",
        action="append",
        choices=SWEEPS,
        help=f"sweep to reproduce, repeatable (default: {', '.join(DEFAULT_SWEEPS)})",
    )
    parser.add_argument("--full", action="store_true", help="reproduce every published sweep")
    results.add_arguments(parser, BENCHMARK, "run a result file again and compare the counts")


class Job:
    """What a run needs: parameters, traces, and where finished cells go.

    Args:
        parameters: What decides the outcome.
        sharegpt: ShareGPT prompt lengths, if its cells are to run.
        journal: Finished cells.
    """

    def __init__(
        self, parameters: dict[str, Any], sharegpt: np.ndarray | None, journal: results.Journal
    ) -> None:
        self.parameters = parameters
        self.journal = journal
        self.trace: Callable[[str, int], Trace] = cache(
            lambda workload, seed: make_trace(workload, seed, sharegpt)
        )

    def cells(self) -> Iterator[tuple[str, Cell]]:
        """Every cell of the run with the table of the journal that it belongs to."""
        parameters = self.parameters
        if "reproduce" in parameters["parts"]:
            for cell in replays(parameters["sweeps"], not parameters["sharegpt"]):
                yield "replay", cell
        if "correct" in parameters["parts"]:
            workloads = (*SYNTHETIC, SHAREGPT) if parameters["sharegpt"] else SYNTHETIC
            for life in parameters["lives"]:
                for cell in Sweep(("corrected",), tuple(parameters["gib"]), workloads).cells():
                    yield life, cell

    def run(self) -> None:
        """Run every cell that the journal lacks."""
        todo = list(self.cells())
        # No bar where nobody looks at it.
        for table, cell in tqdm(todo, unit="cell", disable=None):
            key = f"{table}:{cell.key}"
            if key not in self.journal.done:
                self.journal.add(key, self._run_cell(table, cell))

    def _run_cell(self, table: str, cell: Cell) -> dict[str, Any]:
        trace, model = self.trace(cell.workload, cell.seed), MODELS[cell.model]
        total_bytes = cell.gib * GIB
        if table == "replay":
            allocator = make_allocator(cell.variant, model, total_bytes)
            outcome = replay(trace, model, allocator, total_bytes)
            counts, timings = _split(asdict(outcome))
            counts["oom"] = outcome.oom
            counts["completion_ratio"] = outcome.completed / outcome.submitted
            return {"counts": counts, "timings": timings}
        demand, outcomes = honest.run_cell(trace, model, total_bytes, table)
        limit = outcomes[honest.LIMIT].intact
        variants: dict[str, Any] = {}
        times: dict[str, Any] = {}
        for name, life in outcomes.items():
            counts, times[name] = _split(vars(life))
            counts["intact"] = len(life.intact)
            counts["missed"] = len(limit - life.intact)
            counts["tokens"] = sum(trace.prompts[r] + trace.generated[r] for r in life.intact)
            variants[name] = counts
        return {"counts": {"demand": demand, "variants": variants}, "timings": times}

    def tables(self, part: str) -> dict[str, dict[Cell, Any]]:
        """Finished cells by table; ``part`` is ``counts`` or ``timings``."""
        found: dict[str, dict[Cell, Any]] = {}
        for table, cell in self.cells():
            value = self.journal.done[f"{table}:{cell.key}"][part]
            found.setdefault(table, {})[cell] = value
        return found


def _split(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate what a clock gave from the rest."""
    counts = {name: value for name, value in fields.items() if not name.endswith("_ns")}
    return counts, {name: value for name, value in fields.items() if name.endswith("_ns")}


def _find_folder(args: argparse.Namespace) -> Path | None:
    """Folder of the published tables, if there is one.

    Raises:
        InputError: The user named one that does not exist.
    """
    if args.published is not None:
        if not args.published.is_dir():
            raise InputError(args.published, None, "--published: there is no such folder")
        return args.published
    return published.DEFAULT_FOLDER if published.DEFAULT_FOLDER.is_dir() else None


def _sharegpt_counts(args: argparse.Namespace, folder: Path | None) -> np.ndarray | None:
    if args.sharegpt is not None:
        return read_sharegpt_counts(args.sharegpt)
    if folder is not None and (folder / SHAREGPT_FILE).exists():
        return read_sharegpt_counts(folder / SHAREGPT_FILE)
    return None


def _parameters(args: argparse.Namespace, sharegpt: bool) -> dict[str, Any]:
    sweeps = list(SWEEPS) if args.full else args.sweep or list(DEFAULT_SWEEPS)
    if not sharegpt:
        sweeps = [name for name in sweeps if SWEEPS[name].workloads != (SHAREGPT,)]
    return {
        "parts": [args.part] if args.part else list(PARTS),
        "sweeps": sweeps,
        "lives": list(honest.LIVES),
        "gib": list(honest.ARENAS),
        "sharegpt": sharegpt,
        "splits": [honest.COARSE, honest.FINE],
    }


def _print(parts: Iterator[str]) -> None:
    for part in parts:
        print(part)
        if "\n" in part:
            print()


def _print_reproduction(job: Job, verdicts: list[compare.Verdict]) -> None:
    counts, timings = job.tables("counts")["replay"], job.tables("timings")["replay"]
    print("== 1. Reproduced: the paper's own rules ==\n")
    print(f"sweeps: {report.sweep_names(job.parameters['sweeps'])}; {len(counts)} replays\n")
    _print(report.oom(counts))
    _print(report.batches(counts))
    _print(report.intervals(compare.replayed_intervals(counts)))
    _print(report.losses(counts))
    _print(report.phases(counts, timings))
    if verdicts:
        _print(report.verdicts(verdicts))
    else:
        print("No published tables here (--published DIR): nothing was compared with them.\n")


def _print_correction(job: Job) -> None:
    counts, timings = job.tables("counts"), job.tables("timings")
    for number, life in enumerate(job.parameters["lives"], 2):
        print(f"== {number}. Corrected: {life} ==\n")
        _print(report.corrected(life, counts[life], timings[life]))
        _print(report.goals(life, counts[life]))
        print()


def _result(job: Job) -> dict[str, Any]:
    def by_key(tables: dict[str, dict[Cell, Any]]) -> dict[str, Any]:
        return {
            table: {cell.key: value for cell, value in cells.items()}
            for table, cells in tables.items()
        }

    counts = by_key(job.tables("counts"))
    if "reproduce" in job.parameters["parts"]:
        intervals = compare.replayed_intervals(job.tables("counts")["replay"])
        counts["intervals"] = {"/".join(row): list(found) for row, found in intervals.items()}
    return {
        "format": results.FORMAT,
        "benchmark": BENCHMARK,
        "environment": results.environment(SEED),
        "parameters": job.parameters,
        "counts": counts,
        "timings": by_key(job.tables("timings")),
    }


def _run(args: argparse.Namespace) -> int:
    folder = _find_folder(args)
    sharegpt = _sharegpt_counts(args, folder)
    output, old = results.begin(args, BENCHMARK)
    if old is None:
        parameters = _parameters(args, sharegpt is not None)
    else:
        parameters = old["parameters"]
        if parameters["sharegpt"] and sharegpt is None:
            raise InputError(args.check, None, "holds ShareGPT cells: name their --sharegpt FILE")
    if folder is None and parameters["sharegpt"] is False:
        print("ShareGPT cells are left out: no --sharegpt FILE.", file=sys.stderr)
    beside = results.journal_of(output, args.check)
    identity = {"source": results.source_commit(), "parameters": parameters}
    journal = results.Journal(beside, identity)
    if journal.resumed:
        print(f"Going on behind {journal.resumed} cells of an interrupted run.", file=sys.stderr)
    job = Job(parameters, sharegpt, journal)
    try:
        job.run()
    except KeyboardInterrupt:
        journal.close()
        print(
            f"Interrupted: {len(journal.done)} cells are kept; run the same command to go on.",
            file=sys.stderr,
        )
        return 130
    verdicts: list[compare.Verdict] = []
    if "reproduce" in parameters["parts"]:
        if folder is not None:
            verdicts = compare.compare_all(folder, job.tables("counts")["replay"])
        _print_reproduction(job, verdicts)
    if "correct" in parameters["parts"]:
        _print_correction(job)
    result = _result(job)
    results.save(output, result)
    journal.remove()
    status = 1 if any(verdict.mismatches for verdict in verdicts) else 0
    if old is not None:
        found = list(results.differences(old["counts"], result["counts"]))
        for line in found[: report.LISTED]:
            print(f"DIFFERS {line}")
        print(f"Check of {args.check}: {len(found)} difference(s) in the counts.")
        status = status or bool(found)
    return int(status)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 if a published or checked number differs, 2 for bad input."""
    try:
        return _run(args)
    except InputError as error:
        print(f"avmp bench paper: error: {error}", file=sys.stderr)
        return 2
