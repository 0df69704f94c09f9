"""The benchmark's inputs and checks, on tiny shapes under the interpreter."""

from __future__ import annotations

import pytest
import torch
from avmp_kernels import attention, workloads
from avmp_kernels.measure import Limits, Time

from avmp_vllm.bench import kernels

_CPU = torch.device("cpu")


def test_checks_find_the_kernels_right(capsys) -> None:
    """Every correctness case of `avmp bench kernels`, in fp32; the identity launch agrees."""
    errors = kernels.check_all(kernels.checks(_CPU, torch.float32), "")
    assert len(errors) >= 15
    # Sums of many fp32 terms in another order: more than a rounding, far less than a mistake.
    assert max(errors.values()) < 50, errors


def test_checks_find_a_wrong_kernel(monkeypatch) -> None:
    """A kernel that reads another page is found."""
    workload = workloads.attending([40, 33], [1, 1], 16, _CPU, heads=(2, 1), dtype=torch.float32)
    assert workload.check() < 50
    right = attention.resolve_kv

    def shifted(entries, handle, num_kv, mask):
        return right(entries, handle - 1, num_kv, mask)

    monkeypatch.setattr(attention, "resolve_kv", shifted)
    assert workload.check() > 1000


@pytest.mark.parametrize(
    "make",
    [
        lambda: workloads.resolving(3, 40, 16, _CPU),
        lambda: workloads.writing(5, 16, _CPU, dtype=torch.float32),
        lambda: workloads.attending([20], [1], 16, _CPU, heads=(2, 1), dtype=torch.float32),
        lambda: workloads.updating(3, 1, 8, 16, _CPU, dtype=torch.float32),
        lambda: workloads.convolving([1, 1], 8, _CPU, dtype=torch.float32),
        lambda: workloads.scanning([5], 8, 16, _CPU, dtype=torch.float32),
    ],
)
def test_identity_launches_run(make) -> None:
    """The launch with physical indices, whose time shows what the page table costs."""
    workload = make()
    assert workload.moved > 0
    workload.identity()


def test_unwritten_elements_count_as_wrong() -> None:
    """NaN anywhere is an infinite error."""
    wanted = torch.ones(4)
    found = wanted.clone()
    assert workloads.error(found, wanted, torch.bfloat16) == 0
    found[2] = float("nan")
    assert workloads.error(found, wanted, torch.bfloat16) == float("inf")


def test_rows_of_the_table(monkeypatch, capsys) -> None:
    """Timing rows: the floor, the ratio to physical indices and to stock, a stock that fails."""
    seconds = iter([2e-6, 4e-6, 8e-6, 5e-6, 5e-6])
    monkeypatch.setattr(kernels, "time_launch", lambda launch, ms: _timed(launch, next(seconds)))
    stock = kernels.stock_kernels.STOCK
    monkeypatch.setitem(stock, "resolve", lambda inputs: lambda: None)
    monkeypatch.setitem(stock, "kv_write", lambda inputs: 1 // 0)
    makers = iter(
        [
            lambda: workloads.resolving(3, 40, 16, _CPU),
            lambda: workloads.writing(5, 16, _CPU, dtype=torch.float32),
        ]
    )
    rows = kernels.time_all(makers, "", Limits(copy=1e9, matrix=1e12), (), 1)
    first, second = (kernels._cells(row) for row in rows)
    moved = 3 * 3 * 4 * 3
    assert first[1:] == ["2.0", f"{moved / 1e9 / 2e-6:.1%}", "0.500", "0.250", "-"]
    assert second[3:] == ["1.000", "error", "-"]
    assert "ZeroDivisionError" in rows[1]["stock_error"]


def _timed(launch, seconds: float) -> Time:
    launch()
    return Time(seconds, seconds, seconds)
