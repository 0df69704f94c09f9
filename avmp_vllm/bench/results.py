"""Result files of benchmarks: what was run, on what, and what came out.

A result is one JSON object::

    format       1
    benchmark    name
    environment  commit, command, seed, library versions, kind of machine
    parameters   what decides the outcome; `--check` runs with these
    counts       deterministic outcomes; `--check` wants them equal
    timings      everything that a clock gave; shown, never compared

A file is written beside its final name and renamed when whole, so that a reader never meets half of
one. While a run lasts, its finished cells stand in a journal, from which it can be resumed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from avmp_vllm.bench.inputs import InputError

FORMAT = 1


def source_commit() -> str:
    """Commit of the source, with ``+changes`` and their digest if the working tree differs."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("diff", "HEAD", "--", str(here.parent))
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
    if not changes:
        return commit
    return f"{commit}+changes.{hashlib.sha256(changes.encode()).hexdigest()[:8]}"


def _processor() -> str:
    """Model name of the CPU, and nothing else about the machine."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(seed: int | None, libraries: tuple[str, ...] = ("numpy",)) -> dict[str, Any]:
    """Describe this run: commit, command, seed, versions, kind of machine.

    Args:
        seed: Of the benchmark's own random numbers, if it has any.
        libraries: Distributions whose versions matter.
    """
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in ("avmp-vllm", *libraries):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "commit": source_commit(),
        "command": shlex.join(["avmp", *sys.argv[1:]]),
        "seed": seed,
        "versions": versions,
        "machine": _processor(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w") as file:
        json.dump(result, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def read(path: Path, benchmark: str) -> dict[str, Any]:
    """Read a result file of a benchmark.

    Raises:
        InputError: It is missing, no JSON (with the line), of another benchmark or format.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, None, f"cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(path, error.lineno, f"is not JSON: {error.msg}") from error
    if not isinstance(result, dict) or result.get("benchmark") != benchmark:
        raise InputError(path, None, f"is no result of `avmp bench {benchmark}`")
    if result.get("format") != FORMAT:
        raise InputError(path, None, f"has format {result.get('format')!r}, not {FORMAT}")
    missing = {"environment", "parameters", "counts", "timings"} - result.keys()
    if missing:
        raise InputError(path, None, f"lacks {', '.join(sorted(missing))}")
    return result


def differences(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """Name every place at which two results' counts differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            place = f"{where}/{key}"
            if key not in expected or key not in found:
                yield f"{place}: only in the {'new run' if key in found else 'file'}"
            else:
                yield from differences(expected[key], found[key], place)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from differences(one, other, f"{where}[{index}]")
    elif expected != found:
        yield f"{where}: {expected!r} in the file, {found!r} now"


class Journal:
    """Finished cells of a run that is under way, one JSON line each.

    Args:
        path: Of the result file; the journal stands beside it.
        identity: What must be equal for old cells to be used: commit, parameters.

    Attributes:
        done: Values of finished cells by key, those of an interrupted run included.
        resumed: How many of them an interrupted run left.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path.with_name(path.name + ".journal")
        self.done: dict[str, Any] = {}
        header = json.dumps(identity, sort_keys=True)
        keep = self._recover(header)
        self.resumed = len(self.done)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if keep is None:
            self._file = self._path.open("w")
            self._file.write(header + "\n")
        else:
            # The last line may be torn: go on behind the last whole one.
            self._file = self._path.open("r+")
            self._file.truncate(keep)
            self._file.seek(0, os.SEEK_END)
        self._file.flush()

    def _recover(self, header: str) -> int | None:
        """Read the cells of an interrupted run; bytes of its whole lines, None if of no use."""
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except OSError:
            return None
        if not lines or lines[0] != (header + "\n").encode():
            return None
        size = len(lines[0])
        for line in lines[1:]:
            if not line.endswith(b"\n"):
                break
            key, value = json.loads(line)
            self.done[key] = value
            size += len(line)
        return size

    def add(self, key: str, value: Any) -> None:
        """Keep a finished cell."""
        self.done[key] = value
        self._file.write(json.dumps([key, value]) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file and leave it for a later run."""
        self._file.close()

    def remove(self) -> None:
        """Drop the journal of a run whose result file is whole."""
        self._file.close()
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def resuming(path: Path, parameters: dict[str, Any]) -> Iterator[Journal]:
    """Open the journal of a run; the same command goes on behind what an interrupted one finished.

    Write the result file before the block ends: the journal is dropped then, and kept if the block
    ends in an exception.

    Args:
        path: Of the result file.
        parameters: Of the run; old cells count only if these and the source are the same.
    """
    journal = Journal(path, {"source": source_commit(), "parameters": parameters})
    if journal.resumed:
        print(f"Going on behind {journal.resumed} part(s) of an interrupted run.", file=sys.stderr)
    try:
        yield journal
    except BaseException:
        journal.close()
        raise
    journal.remove()


def journal_of(output: Path | None, check: Path | None) -> Path:
    """Where a run's journal stands: beside what it writes, or beside the file that it checks."""
    if output is not None:
        return output
    assert check is not None
    return check.with_name(check.name + ".check")


def compare(path: Path, expected: dict[str, Any], found: dict[str, Any]) -> bool:
    """Print at which places two results' counts differ; return whether any does.

    Args:
        path: File of the expected result.
        expected, found: Whole results.
    """
    places = list(differences(expected["counts"], found["counts"]))
    for place in places[:10]:
        print(f"DIFFERS {place}")
    print(f"Check of {path}: {len(places)} difference(s) in the counts.")
    return bool(places)


def add_arguments(
    parser: argparse.ArgumentParser, benchmark: str, check: str = "run again and compare"
) -> None:
    """Add ``--output`` and ``--check``.

    Args:
        parser: Of the benchmark's command.
        benchmark: Its name, which is that of its result file.
        check: What ``--check`` does.
    """
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"result file (default {default_output(benchmark)}; with --check: none)",
    )
    parser.add_argument("--check", type=Path, metavar="FILE", help=check)


def default_output(benchmark: str) -> Path:
    """Where a benchmark's result goes if nobody says otherwise."""
    return Path(".bench", f"{benchmark}.json")


def begin(args: argparse.Namespace, benchmark: str) -> tuple[Path | None, dict[str, Any] | None]:
    """Where the result goes, if anywhere, and the result to check, if there is one.

    Raises:
        InputError: The result to check is none of this benchmark's.
    """
    if args.check:
        return args.output, read(args.check, benchmark)
    return args.output or default_output(benchmark), None


def record(
    benchmark: str, environment: dict[str, Any], parameters: dict[str, Any], **outcome: Any
) -> dict[str, Any]:
    """A whole result; ``outcome`` has ``counts``, ``timings`` and what else a benchmark keeps."""
    head = {"format": FORMAT, "benchmark": benchmark}
    return {**head, "environment": environment, "parameters": parameters, **outcome}


def save(output: Path | None, result: dict[str, Any]) -> None:
    """Write a result where it goes, if anywhere, and say so."""
    if output:
        write(output, result)
        print(f"Written: {output}")


def verdict(check: Path | None, expected: dict[str, Any] | None, found: dict[str, Any]) -> int:
    """Exit status of a run: 1 if it is a check and a count differs."""
    return int(check is not None and expected is not None and compare(check, expected, found))
