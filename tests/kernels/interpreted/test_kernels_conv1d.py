"""Causal conv1d against its reference: ragged prefills, decode updates, both state layouts."""

from __future__ import annotations

import pytest
import torch
from avmp_kernels import conv1d
from avmp_kernels.pages import SSM_TAG
from avmp_kernels.reference import ssm as reference
from batches import distinct_handles, generator, random_saves, random_table, starts_of
from hypothesis import given
from hypothesis import strategies as st
from test_kernels_state_update import ssm_view

_NUM_KV, _NUM_SSM = 4, 12


def _states(dim: int, width: int, channels_last: bool, dtype: torch.dtype, seed: int):
    """Return states ``[blocks, channels, width - 1]``, with either dimension contiguous."""
    if channels_last:
        return ssm_view(_NUM_SSM, width - 1, dim, dtype=dtype, seed=seed).transpose(1, 2)
    return ssm_view(_NUM_SSM, dim, width - 1, dtype=dtype, seed=seed)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 4, 16, 37]), max_size=4),
    padding=st.sampled_from([0, 2, 19]),
    dim=st.sampled_from([1, 24, 300]),
    width=st.integers(2, 4),
    channels_last=st.booleans(),
    transposed=st.booleans(),
    bias=st.booleans(),
    activation=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    translate=st.booleans(),
    null=st.booleans(),
    save=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_prefill_equals_reference(
    lengths, padding, dim, width, channels_last, transposed, bias, activation, dtype, translate,
    null, save, seed,
) -> None:  # fmt: skip
    """Outputs, padding rows included, and all states, those saved on the way included."""
    random = generator(seed)
    rows = sum(lengths) + padding
    x = torch.randn(rows, dim, generator=random).to(dtype)
    if transposed:
        x = x.T.contiguous().T
    x[sum(lengths) :] = float("nan")
    weight = torch.randn(dim, width, generator=random).to(dtype)
    shift = torch.randn(dim, generator=random).to(dtype) if bias else None
    has_initial = torch.randint(0, 2, (len(lengths),), generator=random).bool()
    pages = random_table(_NUM_KV, _NUM_SSM, seed) if translate else None
    handles = distinct_handles(len(lengths), _NUM_SSM, translate, seed)
    if null and lengths:
        handles[0] = 0
    saves = random_saves(lengths, handles, _NUM_SSM, translate, seed) if save else None
    states = _states(dim, width, channels_last, dtype, seed)
    for request, resume in enumerate(has_initial.tolist()):
        if not resume and not translate:
            states[handles[request]] = float("nan")  # a fresh state holds anything
    wanted_states = states.clone()
    wanted = torch.empty(rows, dim, dtype=dtype)
    arguments = (handles, starts_of(lengths), has_initial, x, weight, shift)
    options = {"activation": activation, "saves": saves, "pages": pages}
    reference.causal_conv1d(wanted, wanted_states, *arguments, **options)
    out = torch.full((rows, dim), float("nan"), dtype=dtype)
    conv1d.causal_conv1d(out, states, *arguments, **options)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(states, wanted_states, equal_nan=True)


@given(
    batch=st.integers(0, 6),
    dim=st.sampled_from([1, 24, 600]),
    width=st.integers(2, 4),
    channels_last=st.booleans(),
    bias=st.booleans(),
    in_place=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    translate=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_update_equals_reference(
    batch, dim, width, channels_last, bias, in_place, dtype, translate, seed
) -> None:
    """One token a request; a null state gives zeros."""
    random = generator(seed)
    x = torch.randn(batch, dim, generator=random).to(dtype)
    weight = torch.randn(dim, width, generator=random).to(dtype)
    shift = torch.randn(dim, generator=random).to(dtype) if bias else None
    pages = random_table(_NUM_KV, _NUM_SSM, seed) if translate else None
    handles = distinct_handles(batch, _NUM_SSM, translate, seed)
    if batch > 1:
        handles[1] = SSM_TAG if translate else 0
    states = _states(dim, width, channels_last, dtype, seed)
    wanted_states = states.clone()
    wanted = torch.empty_like(x)
    starts = torch.arange(batch + 1)
    reference.causal_conv1d(
        wanted, wanted_states, handles, starts, None, x, weight, shift, pages=pages
    )
    out = x if in_place else torch.full_like(x, float("nan"))
    conv1d.causal_conv1d_update(out, states, handles, x, weight, shift, pages=pages)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(states, wanted_states)


def test_prefill_then_updates() -> None:
    """A request cut into chunks and single tokens gives what it gives in one piece."""
    x = torch.randn(20, 8, generator=generator(1))
    weight = torch.randn(8, 4, generator=generator(2))
    handles = torch.tensor([3], dtype=torch.int32)
    whole, pieces = torch.empty(20, 8), torch.empty(20, 8)
    states = torch.zeros(5, 8, 3)
    no, yes = torch.tensor([False]), torch.tensor([True])
    conv1d.causal_conv1d(whole, states, handles, starts_of([20]), no, x, weight)
    last = states[3].clone()
    conv1d.causal_conv1d(pieces[:2], states, handles, starts_of([2]), no, x[:2], weight)
    conv1d.causal_conv1d(pieces[2:18], states, handles, starts_of([16]), yes, x[2:18], weight)
    for t in (18, 19):
        piece = slice(t, t + 1)
        conv1d.causal_conv1d_update(pieces[piece], states, handles, x[piece], weight)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(states[3], last)


def test_shapes_that_do_not_fit() -> None:
    """Refused with the shapes."""
    x, handles = torch.zeros(1, 8), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="states hold width - 1 inputs"):
        conv1d.causal_conv1d_update(x, torch.zeros(3, 8, 4), handles, x, torch.zeros(8, 4))
