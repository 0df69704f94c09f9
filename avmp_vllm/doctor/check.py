"""One line of the report."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Mark = Literal["ok", "warn", "fail"]
NAME_WIDTH = 14


@dataclass(frozen=True)
class Check:
    """What was looked at and what was found.

    Attributes:
        mark: ``fail`` decides the exit status, ``warn`` does not.
        name: What was looked at, a word or two.
        says: What was found, one line.
        way_out: What to do about it; empty where there is nothing to do.
        data: The figures behind ``says``, for ``--json``.
    """

    mark: Mark
    name: str
    says: str
    way_out: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The check for people: a line, and a second one if there is a way out."""
        shown = [f"  {self.mark:<4}  {self.name:<{NAME_WIDTH}}  {self.says}"]
        if self.way_out:
            shown.append(f"  {'':4}  {'':{NAME_WIDTH}}  -> {self.way_out}")
        return shown

    def as_json(self) -> dict[str, Any]:
        """The check for machines."""
        return asdict(self)


def ok(name: str, says: str, **data: Any) -> Check:
    """A check that found what it should."""
    return Check("ok", name, says, data=data)


def warn(name: str, says: str, way_out: str = "", **data: Any) -> Check:
    """A check that found something to know."""
    return Check("warn", name, says, way_out, data)


def fail(name: str, says: str, way_out: str, **data: Any) -> Check:
    """A check that found what keeps AVMP from working, and the way out."""
    return Check("fail", name, says, way_out, data)


def one_line(error: BaseException) -> str:
    """An error's message on one line, with its type where the message alone says little."""
    text = " ".join(str(error).split())
    return text if len(text) > 20 else f"{type(error).__name__}: {text}".rstrip(": ")


def refusal_of(name: str, error: Exception) -> Check:
    """A failed check of one of AVMP's own errors, whose last clause is the way out."""
    text = one_line(error)
    parts = re.fullmatch(r"(.+)[;:.] (.+)", text)
    return fail(name, *parts.groups()) if parts else fail(name, text, "")
