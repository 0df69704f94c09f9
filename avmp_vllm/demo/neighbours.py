"""How much of the machine other programs took while a server was measured.

Two servers that are measured one after the other compare only if both had the machine to
themselves; this figure says whether they had.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

import psutil


class CPUTimes(NamedTuple):
    """CPU seconds since some fixed moment: of all cores, idle cores, and this process tree."""

    total: float
    idle: float
    own: float


def cpu_times() -> CPUTimes:
    """Read the counters of the machine, of this process and of all processes below it."""
    machine = psutil.cpu_times()
    idle = machine.idle + getattr(machine, "iowait", 0.0)
    total = sum(machine) - getattr(machine, "guest", 0.0) - getattr(machine, "guest_nice", 0.0)
    me = psutil.Process(os.getpid())
    own = 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            own += times.user + times.system
    return CPUTimes(total, idle, own)


def foreign_share(begin: CPUTimes, end: CPUTimes) -> float:
    """Share of all cores, 0 to 1, that went to other programs between two readings."""
    total = end.total - begin.total
    if total <= 0:
        return 0.0
    foreign = total - (end.idle - begin.idle) - (end.own - begin.own)
    return min(1.0, max(0.0, foreign / total))
