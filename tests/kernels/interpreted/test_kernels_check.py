"""Debug mode: the first bad handle is found on the device and named."""

from __future__ import annotations

import pytest
import torch
from avmp_kernels.check import HandleCheck
from avmp_kernels.pages import SSM_TAG
from avmp_kernels.reference.pages import first_bad_handle
from batches import distinct_handles, generator, random_table
from hypothesis import given
from hypothesis import strategies as st

_NUM_KV, _NUM_SSM = 30, 20


def _good_table(is_ssm: bool, seed: int) -> torch.Tensor:
    size = _NUM_SSM if is_ssm else _NUM_KV
    return distinct_handles(12, size, is_ssm, seed).reshape(3, 4)


@given(is_ssm=st.booleans(), seed=st.integers(0, 1000), faults=st.integers(0, 4))
def test_finds_what_the_reference_finds(is_ssm, seed, faults) -> None:
    """Nothing in a good table, and the first in row order of several bad ones."""
    random = generator(seed)
    pages = random_table(_NUM_KV, _NUM_SSM, seed)
    table = _good_table(is_ssm, seed)
    bad = [-1, _NUM_KV, SSM_TAG + _NUM_SSM, 5 if is_ssm else SSM_TAG + 5, (1 << 31) - 1]
    for _ in range(faults):
        row, column = (int(torch.randint(0, n, (), generator=random)) for n in table.shape)
        table[row, column] = bad[int(torch.randint(0, len(bad), (), generator=random))]
    counts = torch.tensor([4, 0, 3], dtype=torch.int32)
    limit = _NUM_SSM if is_ssm else _NUM_KV
    where = first_bad_handle(table, counts, is_ssm, pages, limit)
    check = HandleCheck(3, table.device)
    check.check(2, table, counts, is_ssm, pages, limit)
    if where is None:
        check.raise_if_bad()
    else:
        message = f"group 2, row {where[0]}, column {where[1]}"
        with pytest.raises(ValueError, match=message):
            check.raise_if_bad()
        check.raise_if_bad()  # the verdict was taken


@pytest.mark.parametrize(
    ("handle", "why"),
    [
        (SSM_TAG + 4, "not a handle of the KV pool"),
        (-7, "not a handle of the KV pool"),
        (_NUM_KV, f"has {_NUM_KV} KV entries"),
        (6, "is not mapped"),
        (7, "maps to 500, outside of the arena"),
    ],
)
def test_says_why(handle, why) -> None:
    """The message names the handle and what is wrong with it."""
    pages = random_table(_NUM_KV, _NUM_SSM, seed=1)
    pages.entries[6], pages.entries[7] = 0, 500
    table = torch.tensor([[1, 0, handle]], dtype=torch.int32)
    check = HandleCheck(1, table.device)
    check.check(0, table, torch.tensor([2], dtype=torch.int32), False, pages, _NUM_KV)
    check.raise_if_bad()
    check.check(0, table, torch.tensor([3], dtype=torch.int32), False, pages, _NUM_KV)
    with pytest.raises(ValueError, match=why) as error:
        check.raise_if_bad()
    assert hex(handle) in str(error.value)
    check.check(0, table, torch.tensor([3], dtype=torch.int32), False, pages, _NUM_KV)
    with pytest.raises(ValueError, match="group 0, request a-7, column 2"):
        check.raise_if_bad(["a-7"])
