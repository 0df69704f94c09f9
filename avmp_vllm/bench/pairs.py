"""Figures of several sides, measured in rounds: ratios to a base, intervals, verdicts, targets.

A round is a mapping of side -> ``{"figures": {key: number}, ...}``; the members of a round belong
together and are resampled together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from avmp_vllm.bench.statistics import SEED, Interval, ratio_of_means
from avmp_vllm.bench.tables import table

Rounds = Sequence[Mapping[str, Any]]


class Row(NamedTuple):
    """One figure: key, label, number format, whether more is better (None: neither)."""

    key: str
    label: str
    form: str
    more: bool | None


def values(rounds: Rounds, side: str, key: str) -> list[float] | None:
    """A figure of every round; None if the side does not have it."""
    found = [one[side]["figures"].get(key) for one in rounds]
    return None if not found or None in found else found


def ratios(rounds: Rounds, rows: Sequence[Row], side: str, base: str) -> dict[str, Interval]:
    """``side / base`` of every figure that both have and that is 0 in no round of the base's."""
    result = {}
    for row in rows:
        ours, theirs = (values(rounds, one, row.key) for one in (side, base))
        if ours is None or theirs is None or not all(theirs):
            continue
        result[row.key] = ratio_of_means(ours, theirs, np.random.default_rng(SEED))
    return result


def verdict(row: Row, ratio: Interval, side: str, base: str) -> str:
    """In words whom a figure favours, if its interval excludes 1."""
    if row.more is None or ratio.low <= 1 <= ratio.high:
        return ""
    return f"{side if (ratio.point > 1) is row.more else base} better"


def judge(ratio: Interval, bound: float, above: bool) -> str:
    """Whether the whole interval keeps a bound.

    Returns:
        ``reached``, ``missed``, or ``open`` where the interval spans the bound.
    """
    if above:
        low, high = ratio.low >= bound, ratio.high < bound
    else:
        low, high = ratio.high <= bound, ratio.low > bound
    return "reached" if low else "missed" if high else "open"


def comparison(
    rounds: Rounds, rows: Sequence[Row], sides: Sequence[str], base: str, names: Mapping[str, str]
) -> str:
    """A table: means of all sides, then each side's ratio to the base and whom it favours.

    Args:
        rounds: What was measured.
        rows: Figures; one that no side has is left out.
        sides: Those that are compared with the base.
        base: The baseline.
        names: Of sides, as printed.
    """
    found = {side: ratios(rounds, rows, side, base) for side in sides}
    head = ["mean over rounds", *(names[side] for side in (*sides, base))]
    for side in sides:
        head += [f"{names[side]} / {names[base]}", "95%", "favours"]
    lines = []
    for row in rows:
        measured = [values(rounds, side, row.key) for side in (*sides, base)]
        if not any(measured):
            continue
        line = [row.label]
        line += ["-" if one is None else f"{np.mean(one):{row.form}}" for one in measured]
        for side in sides:
            ratio = found[side].get(row.key)
            if ratio is None:
                line += ["-", "-", ""]
                continue
            line += [f"{ratio.point:.3f}", f"[{ratio.low:.3f}, {ratio.high:.3f}]"]
            line.append(verdict(row, ratio, names[side], names[base]))
        lines.append(line)
    return table(head, lines)
