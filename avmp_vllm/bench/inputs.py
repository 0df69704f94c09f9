"""Reading what a user hands in: one clear error that names the file and the line."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class OptionError(ValueError):
    """An option whose value cannot be used; names both."""


class InputError(ValueError):
    """A file that a user named is missing or ill-formed.

    Args:
        path: The file.
        line: Line number from 1, if one line is at fault.
        problem: What is wrong, in words.
    """

    def __init__(self, path: Path, line: int | None, problem: str) -> None:
        where = f"{path}:{line}" if line else str(path)
        super().__init__(f"{where}: {problem}")


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a CSV file with a header.

    Args:
        path: The file.
        columns: Names that the header must have; others are allowed.

    Yields:
        Line number and the row by column name.

    Raises:
        InputError: The file cannot be read, a column is missing, a row is short or long.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, None)
            missing = [name for name in columns if name not in (header or [])]
            if header is None or missing:
                raise InputError(path, 1, f"the header lacks the column(s) {', '.join(missing)}")
            for row in reader:
                if len(row) != len(header):
                    problem = f"{len(row)} fields where the header has {len(header)}"
                    raise InputError(path, reader.line_num, problem)
                yield reader.line_num, dict(zip(header, row, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(path, None, f"cannot be read: {error}") from error


def json_object(text: str) -> dict[str, Any]:
    """Argument type: an object in JSON."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error.msg}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, as in '{{}}'")
    return found
