"""Mamba-1's selective scan against its reference, and against the state update."""

from __future__ import annotations

import pytest
import torch
from avmp_kernels import page_table, relocate, selective_scan, state_update
from avmp_kernels.pages import SSM_TAG
from avmp_kernels.reference import ssm as reference
from avmp_kernels.saves import ChunkSaves
from batches import distinct_handles, generator, random_saves, random_table, starts_of
from hypothesis import given
from hypothesis import strategies as st
from test_kernels_state_update import ssm_view

_NUM_KV, _NUM_SSM = 4, 12


def _inputs(rows: int, dim: int, n: int, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    random = generator(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    return {
        "x": draw(rows, dim),
        "dt": draw(dim, rows).T,
        "A": -torch.rand(dim, n, generator=random) - 0.1,
        "B": draw(rows, n),
        "C": draw(rows, n),
        "D": torch.randn(dim, generator=random),
        "z": draw(rows, dim),
        "dt_bias": torch.randn(dim, generator=random),
    }


@given(
    lengths=st.lists(st.sampled_from([0, 1, 5, 8, 19]), max_size=3),
    padding=st.sampled_from([0, 2, 9]),
    dim=st.sampled_from([1, 16, 40]),
    n=st.sampled_from([4, 16, 24]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    without=st.sets(st.sampled_from(["D", "z", "dt_bias"])),
    translate=st.booleans(),
    null=st.booleans(),
    save=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_reference(
    lengths, padding, dim, n, dtype, without, translate, null, save, seed
) -> None:
    """Outputs, padding rows included, and all states, those saved on the way included."""
    rows = sum(lengths) + padding
    inputs = _inputs(rows, dim, n, dtype, seed) | dict.fromkeys(without)
    inputs["x"][sum(lengths) :] = float("nan")
    has_initial = torch.randint(0, 2, (len(lengths),), generator=generator(seed)).bool()
    pages = random_table(_NUM_KV, _NUM_SSM, seed) if translate else None
    handles = distinct_handles(len(lengths), _NUM_SSM, translate, seed)
    if null and lengths:
        handles[0] = 0
    saves = random_saves(lengths, handles, _NUM_SSM, translate, seed) if save else None
    states = ssm_view(_NUM_SSM, dim, n, dtype=dtype, seed=seed)
    for request, resume in enumerate(has_initial.tolist()):
        if not resume and not translate:
            states[handles[request]] = float("nan")  # a fresh state holds anything
    wanted_states = states.clone()
    wanted = torch.empty(rows, 1, dim, dtype=dtype)
    with_heads = {
        name: None if t is None else t.unsqueeze(0 if name in ("A", "D", "dt_bias") else 1)
        for name, t in inputs.items()
    }
    head = wanted_states[:, None]
    reference.selective_scan(
        wanted, head, handles, starts_of(lengths), has_initial, **with_heads, saves=saves,
        pages=pages,
    )  # fmt: skip
    out = torch.full((rows, dim), float("nan"), dtype=dtype)
    selective_scan.selective_scan(
        out, states, handles, starts_of(lengths), has_initial, **inputs, saves=saves, pages=pages
    )
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(out, wanted[:, 0], **tolerance)
    torch.testing.assert_close(states, wanted_states, equal_nan=True, **tolerance)


@given(
    length=st.integers(2, 40),
    inside=st.lists(st.integers(1, 39), min_size=1, max_size=3, unique=True),
    resume=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_saved_state_is_what_a_cut_leaves_to_the_bit(length, inside, resume, seed) -> None:
    """And so are the outputs and the last state; one token off is another state."""
    inside = sorted(position for position in inside if position < length) or [1]
    inputs = _inputs(length, 16, 16, torch.float32, seed)
    states = ssm_view(6, 16, 16, dtype=torch.float32, seed=seed)
    wanted_states = states.clone()
    wanted, out = torch.empty(length, 16), torch.empty(length, 16)
    one = torch.tensor([1], dtype=torch.int32)
    begin, resumes = 0, resume
    for number, end in enumerate((*inside, length)):
        part = {
            name: t if name in ("A", "D", "dt_bias") else t[begin:end] for name, t in inputs.items()
        }
        selective_scan.selective_scan(
            wanted[begin:end], wanted_states, one, starts_of([end - begin]),
            torch.tensor([resumes]), **part,
        )  # fmt: skip
        if number < len(inside):
            wanted_states[2 + number] = wanted_states[1]
        begin, resumes = end, True

    def saving(tokens):
        saves = ChunkSaves(
            torch.tensor([tokens], dtype=torch.int32),
            torch.arange(2, 2 + len(tokens), dtype=torch.int32)[None],
        )
        found = states.clone()
        selective_scan.selective_scan(
            out, found, one, starts_of([length]), torch.tensor([resume]), **inputs, saves=saves
        )
        return found

    assert torch.equal(saving(inside), wanted_states)
    assert torch.equal(out, wanted)
    if inside[0] > 1:
        assert not torch.equal(saving([inside[0] - 1, *inside[1:]])[2], wanted_states[2])


def test_prefill_relocation_decode() -> None:
    """A prefill in two chunks, the state moved, then decode steps: what one long scan gives."""
    rows, dim, n = 23, 16, 16
    inputs = _inputs(rows, dim, n, torch.float32, 9)
    no, yes = torch.tensor([False]), torch.tensor([True])
    wanted, whole = torch.empty(rows, dim), torch.zeros(2, dim, n)
    one = torch.tensor([1], dtype=torch.int32)
    selective_scan.selective_scan(wanted, whole, one, starts_of([rows]), no, **inputs)

    def piece(begin, end):
        return {
            name: t if name in ("A", "D", "dt_bias") else t[begin:end] for name, t in inputs.items()
        }

    pages = random_table(_NUM_KV, _NUM_SSM, 9)
    states = torch.zeros(_NUM_SSM, dim, n)
    handle = SSM_TAG + 5
    handles = torch.tensor([handle], dtype=torch.int32)
    out = torch.full((rows, dim), float("nan"))

    def scan(begin, end, resume):
        selective_scan.selective_scan(
            out[begin:end], states, handles, starts_of([end - begin]), resume, **piece(begin, end),
            pages=pages,
        )  # fmt: skip

    def move(target, copy):
        source = int(pages.entries[_NUM_KV + 5])
        size = dim * n * 4
        if copy:
            arena = states.view(torch.uint8).flatten()
            relocate.relocate(arena, [(1, source, target)], (size, size))
        page_table.update(pages, [(handle, target)])
        states[source] = float("nan")

    free = [s for s in range(1, _NUM_SSM) if s != int(pages.entries[_NUM_KV + 5])]
    scan(0, 7, no)
    move(free[0], copy=True)
    scan(7, 20, yes)
    move(free[1], copy=True)
    for t in range(20, rows):
        state_update.selective_state_update(
            out[t : t + 1], states, handles, **piece(t, t + 1), pages=pages
        )
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[free[1]], whole[1], rtol=1e-4, atol=1e-5)
    # Without the copy the next token reads another state: the comparison can fail.
    states[free[2]] = 0.0
    move(free[2], copy=False)
    scan(rows - 1, rows, yes)
    assert not torch.allclose(out[-1], wanted[-1], atol=1e-3)


def test_shapes_that_do_not_fit() -> None:
    """Refused with the shapes."""
    inputs = _inputs(3, 8, 16, torch.float32, 1)
    with pytest.raises(ValueError, match="do not fit"):
        selective_scan.selective_scan(
            torch.empty(3, 8), torch.zeros(2, 8, 4), torch.zeros(1, dtype=torch.int32),
            starts_of([3]), torch.tensor([True]), **inputs,
        )  # fmt: skip
