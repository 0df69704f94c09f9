"""Selective state update against its reference: Mamba-1, Mamba-2, strided states, padding."""

from __future__ import annotations

import pytest
import torch
from avmp_kernels import state_update
from avmp_kernels.pages import SSM_TAG
from avmp_kernels.reference import ssm as reference
from batches import distinct_handles, generator, random_table
from hypothesis import given
from hypothesis import strategies as st

_NUM_KV, _NUM_SSM = 5, 80


def ssm_view(blocks: int, *shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return one layer's states ``[blocks, *shape]``, strided as inside of an SSM block."""
    size = torch.Size(shape).numel()
    arena = torch.randn(blocks, size + 24, generator=generator(seed)).to(dtype)
    return arena[:, 8 : 8 + size].unflatten(1, shape)


def _inputs(batch, heads, groups, dim, n, dtype, seed, shared_dt) -> dict[str, torch.Tensor]:
    random = generator(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    inputs = {
        "x": draw(batch, heads, dim),
        "dt": draw(batch, heads, dim),
        "A": -torch.rand(heads, dim, n, generator=random) - 0.1,
        "B": draw(batch, groups, n),
        "C": draw(batch, groups, n),
        "D": torch.randn(heads, dim, generator=random),
        "z": draw(batch, heads, dim),
        "dt_bias": torch.randn(heads, dim, generator=random),
    }
    if shared_dt:
        inputs["dt"] = draw(batch, heads)[..., None].expand(-1, -1, dim)
        inputs["A"] = inputs["A"][:, :1, :1].expand(-1, dim, n)
        inputs["dt_bias"] = inputs["dt_bias"][:, :1].expand(-1, dim)
    return inputs


@given(
    batch=st.sampled_from([0, 1, 2, 5, 66]),
    heads_groups=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    dim=st.sampled_from([1, 8, 20]),
    n=st.sampled_from([4, 16, 24]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    shared_dt=st.booleans(),
    without=st.sets(st.sampled_from(["D", "z", "dt_bias"])),
    translate=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_reference(
    batch, heads_groups, dim, n, dtype, shared_dt, without, translate, seed
) -> None:
    """Outputs and all states, those of other requests included."""
    heads, groups = heads_groups
    inputs = _inputs(batch, heads, groups, dim, n, dtype, seed, shared_dt)
    inputs |= dict.fromkeys(without)
    pages = random_table(_NUM_KV, _NUM_SSM, seed) if translate else None
    handles = distinct_handles(batch, _NUM_SSM, translate, seed)
    states = ssm_view(_NUM_SSM, heads, dim, n, dtype=dtype, seed=seed)
    if batch > 1:
        # A padding row of a captured graph: its state is null, its inputs are anything.
        handles[-1] = 0
        inputs["x"][-1] = float("nan")
    wanted_states = states.clone()
    wanted = torch.empty(batch, heads, dim, dtype=dtype)
    clean = {name: None if t is None else t.nan_to_num() for name, t in inputs.items()}
    reference.selective_state_update(wanted, wanted_states, handles, **clean, pages=pages)
    out = torch.full_like(wanted, float("nan"))
    state_update.selective_state_update(out, states, handles, **inputs, pages=pages)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(out, wanted, **tolerance)
    torch.testing.assert_close(states, wanted_states, **tolerance)


def test_mamba1_shapes_and_bad_handles() -> None:
    """Without head and group dimensions; bad handles behave as null ones and touch nothing."""
    inputs = _inputs(4, 1, 1, 8, 16, torch.float32, 3, False)
    pages = random_table(_NUM_KV, _NUM_SSM, 3)
    handles = torch.tensor([SSM_TAG + 3, 3, SSM_TAG + _NUM_SSM, -9], dtype=torch.int32)
    states = ssm_view(_NUM_SSM, 8, 16, dtype=torch.float32, seed=3)
    before = states.clone()
    out = torch.full((4, 8), float("nan"))
    flat = {
        name: tensor.squeeze(0 if name in ("A", "D", "dt_bias") else 1)
        for name, tensor in inputs.items()
    }
    state_update.selective_state_update(out, states, handles, **flat, pages=pages)
    assert out[0].abs().min() > 0
    assert (out[1:] == 0).all()
    changed = (states != before).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == [int(pages.entries[_NUM_KV + 3])]


def test_wrong_page_table_changes_the_result() -> None:
    """Two entries swapped without moving the bytes: the comparison above can fail."""
    inputs = _inputs(2, 1, 1, 8, 16, torch.float32, 5, False)
    handles = distinct_handles(2, _NUM_SSM, True, 5)
    outputs = []
    for swap in (False, True):
        pages = random_table(_NUM_KV, _NUM_SSM, 5)
        at = pages.num_kv + (handles - SSM_TAG).long()
        if swap:
            pages.entries[at] = pages.entries[at.flip(0)]
        states = ssm_view(_NUM_SSM, 1, 8, 16, dtype=torch.float32, seed=5)
        outputs.append(torch.empty(2, 1, 8))
        state_update.selective_state_update(outputs[-1], states, handles, **inputs, pages=pages)
    assert not torch.allclose(*outputs)


def test_shapes_that_do_not_fit() -> None:
    """Refused with the shapes; a type that is not taken names the setting that works."""
    inputs = _inputs(2, 4, 3, 8, 16, torch.float32, 5, False)
    states = ssm_view(4, 4, 8, 16, dtype=torch.float32, seed=5)
    handles = torch.zeros(2, dtype=torch.int32)
    out = torch.empty(2, 4, 8)
    with pytest.raises(ValueError, match="4 heads do not divide into 3 groups"):
        state_update.selective_state_update(out, states, handles, **inputs)
    with pytest.raises(ValueError, match="do not fit"):
        state_update.selective_state_update(out, states[:, :, :7], handles, **inputs)
    with pytest.raises(ValueError, match="'resolved'"):
        state_update.selective_state_update(out, states.to(torch.int8), handles, **inputs)
