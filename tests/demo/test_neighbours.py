"""CPU time of other programs."""

from __future__ import annotations

import pytest

from avmp_vllm.demo.neighbours import CPUTimes, cpu_times, foreign_share


@pytest.mark.parametrize(
    ("end", "share"),
    [
        (CPUTimes(total=100, idle=100, own=0), 0.0),
        (CPUTimes(total=100, idle=40, own=60), 0.0),
        (CPUTimes(total=100, idle=20, own=30), 0.5),
        (CPUTimes(total=100, idle=0, own=0), 1.0),
        (CPUTimes(total=100, idle=50, own=51), 0.0),  # counters of different clocks
        (CPUTimes(total=0, idle=0, own=0), 0.0),
    ],
)
def test_what_is_neither_idle_nor_ours_is_foreign(end: CPUTimes, share: float) -> None:
    assert foreign_share(CPUTimes(0, 0, 0), end) == pytest.approx(share)


def test_our_own_work_is_ours() -> None:
    begin = cpu_times()
    while cpu_times().own < begin.own + 0.2:
        sum(range(10_000))
    end = cpu_times()
    assert end.own >= begin.own + 0.2
    assert end.total > begin.total
    assert 0 <= foreign_share(begin, end) <= 1
