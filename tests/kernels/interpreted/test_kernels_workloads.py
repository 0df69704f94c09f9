"""The benchmark's inputs and checks, on tiny shapes under the interpreter."""

from __future__ import annotations

import pytest
import torch
from avmp_kernels import attention, workloads

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
