"""Mamba on vLLM's CPU build: the scan against float64, the layers against transformers."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from enginelib import engine, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from avmp_vllm.engine.cpu import mamba as cpu_mamba
from avmp_vllm.engine.cpu.scan import exp32, selective_scan
from avmp_vllm.models.tiny_hybrids import write_tiny_nemotron_h

# --- the scan ---------------------------------------------------------------------------------


def reference(x, dt, A, B, C, state, slots, starts, resume, D, z, bias):
    """The recurrence in float64, one step at a time; changes ``state``."""
    x, dt, A, B, C, D, z, bias = (t.double() for t in (x, dt, A, B, C, D, z, bias))
    y = D * x * F.silu(z)  # what padding gets: no state, the skip and the gate only
    for slot, first, last, resumes in zip(slots, starts[:-1], starts[1:], resume, strict=True):
        if slot <= 0 or first == last:
            continue
        h = state[slot].double() if resumes else torch.zeros_like(A)
        for t in range(first, last):
            step = F.softplus(dt[t] + bias)[:, None]
            h = torch.exp(step * A) * h + step * x[t][:, None] * B[t]
            y[t] = ((h * C[t]).sum(-1) + D * x[t]) * F.silu(z[t])
        state[slot] = h.to(state.dtype)
    return y


def strided_states(slots: int, channels: int, size: int, gap: int, dtype, generator):
    """A view of states in a larger buffer, ``gap`` elements between them, and the buffer."""
    buffer = torch.randn(slots, channels * size + gap, generator=generator).to(dtype)
    return buffer[:, gap // 2 : gap // 2 + channels * size].view(slots, channels, size), buffer


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    channels=st.sampled_from([1, 15, 16, 17, 40]),
    size=st.sampled_from([1, 8, 16, 21]),
    gap=st.sampled_from([0, 2, 64, 1000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activations=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
    seed=st.integers(0, 2**16),
)
def test_scan_equals_float64(lengths, channels, size, gap, dtype, activations, data, seed):
    generator = torch.Generator().manual_seed(seed)
    count = len(lengths)
    places = data.draw(st.permutations(range(1, count + 3)))[:count]
    pads = data.draw(st.lists(st.sampled_from([None, 0, -1]), min_size=count, max_size=count))
    slots = [place if pad is None else pad for place, pad in zip(places, pads, strict=True)]
    resume = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    starts = [0, *np.cumsum(lengths).tolist()]

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(activations)

    states, buffer = strided_states(count + 3, channels, size, gap, dtype, generator)
    twin = buffer.clone()
    expected_states = twin.as_strided(states.shape, states.stride(), states.storage_offset())
    x, dt, z = (normal(starts[-1], channels) for _ in range(3))
    B, C = normal(starts[-1], size), normal(starts[-1], size)
    A = -torch.rand(channels, size, generator=generator) * 16
    D, bias = torch.randn(channels, generator=generator), torch.full((channels,), -2.0)

    y = selective_scan(
        x,
        dt,
        A,
        B,
        C,
        states,
        slots=torch.tensor(slots, dtype=torch.int32),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        has_initial_state=torch.tensor(resume),
        D=D,
        z=z,
        dt_bias=bias,
    )
    expected = reference(x, dt, A, B, C, expected_states, slots, starts, resume, D, z, bias)

    assert y.dtype == activations
    assert y.shape == x.shape
    loose = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
    torch.testing.assert_close(y.double(), expected, rtol=loose[activations], atol=1e-4)
    torch.testing.assert_close(states, expected_states, rtol=loose[dtype], atol=1e-5)
    # Nothing outside of the states of this batch was written.
    written = torch.zeros(len(buffer), dtype=torch.bool)
    written[[s for s, n in zip(slots, lengths, strict=True) if s > 0 and n]] = True
    assert torch.equal(buffer[~written], twin[~written])
    states.zero_()
    expected_states.zero_()
    assert torch.equal(buffer, twin)


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(1, 49), max_size=5, unique=True), seed=st.integers(0, 99))
def test_scan_in_chunks_is_the_same_to_the_bit(cuts, seed):
    """Chunked prefill and decode give what one pass gives, whatever the chunks."""
    generator = torch.Generator().manual_seed(seed)
    steps, channels, size = (
        50,
        64,
        16,
    )  # whole vectors: torch rounds the tails of softplus otherwise
    x, dt = (torch.randn(steps, channels, generator=generator) for _ in range(2))
    B, C = (torch.randn(steps, size, generator=generator) for _ in range(2))
    A = -torch.rand(channels, size, generator=generator)

    def scan(state, first, last, resume):
        part = slice(first, last)
        return selective_scan(
            x[part],
            dt[part],
            A,
            B[part],
            C[part],
            state,
            slots=torch.tensor([1]),
            query_start_loc=torch.tensor([0, last - first]),
            has_initial_state=torch.tensor([resume]),
        )

    whole, chunked = (torch.full((2, channels, size), torch.nan) for _ in range(2))
    bounds = [0, *sorted(cuts), steps]
    parts = [scan(chunked, first, last, first > 0) for first, last in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(parts), scan(whole, 0, steps, False))
    assert torch.equal(whole[1], chunked[1])
    assert whole[0].isnan().all()  # the null slot was not touched


def test_a_poisoned_state_is_seen():
    """A NaN in a state must come out: tests with poisoned pages count on it."""
    state = torch.zeros(2, 16, 16)
    state[1, 3, 5] = torch.nan
    one = {
        "slots": torch.tensor([1]),
        "query_start_loc": torch.tensor([0, 1]),
        "has_initial_state": torch.tensor([True]),
    }
    inputs = torch.ones(1, 16), torch.ones(1, 16), -torch.ones(16, 16)
    y = selective_scan(*inputs, torch.ones(1, 16), torch.ones(1, 16), state, **one)
    assert y.isnan().nonzero().tolist() == [[0, 3]]


def test_a_state_with_gaps_inside_is_refused():
    state = torch.zeros(2, 16, 32)[:, :, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        selective_scan(
            *(torch.ones(1, 16), torch.ones(1, 16), -torch.ones(16, 16)),
            *(torch.ones(1, 16), torch.ones(1, 16), state),
            slots=torch.tensor([1]),
            query_start_loc=torch.tensor([0, 1]),
            has_initial_state=torch.tensor([True]),
        )


@njit
def _exp_all(values, results):
    for index in range(len(values)):
        results[index] = exp32(values[index])


def test_exp_is_within_two_units_in_the_last_place():
    values = np.linspace(-86.9, 87.9, 500_001).astype(np.float32)
    results = np.empty_like(values)
    _exp_all(values, results)
    exact = np.exp(values.astype(np.float64))
    assert (np.abs(results - exact) / np.spacing(exact.astype(np.float32))).max() < 2
    outside = np.array([-1000, -np.inf, 0], np.float32)
    results = np.empty_like(outside)
    _exp_all(outside, results)
    assert results[0] < 1e-37
    assert results[1] < 1e-37
    assert results[2] == 1


# --- the layer --------------------------------------------------------------------------------

# Lengths around the KV page, the checkpoints and the chunks; some share a prefix.
LENGTHS = (1, 2, 5, 31, 32, 33, 64, 130, 257, 300)
ANSWER = 24


def prompts() -> list[list[int]]:
    rng = random.Random(7)
    prefix = tokens(rng, 200)
    return [tokens(rng, n) for n in LENGTHS] + [prefix + tokens(rng, n) for n in (1, 40, 70)]


def answers(llm) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    batch = [{"prompt_token_ids": prompt} for prompt in prompts()]
    return [list(o.outputs[0].token_ids) for o in llm.generate(batch, params, use_tqdm=False)]


def transformers_answers(folder: str) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    results = []
    for prompt in prompts():
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=ANSWER,
            min_new_tokens=ANSWER,
            do_sample=False,
            eos_token_id=None,
        )
        results.append(output[0, len(prompt) :].tolist())
    return results


@pytest.fixture(scope="module")
def expected(tiny_jamba) -> list[list[int]]:
    return transformers_answers(tiny_jamba)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="chunks-of-256"),
        pytest.param({"max_num_batched_tokens": 48, "max_num_seqs": 4}, id="chunks-of-48"),
        pytest.param({"enable_prefix_caching": True}, id="prefix-caching"),
    ],
)
def test_jamba_answers_as_transformers_does(tiny_jamba, expected, options):
    with engine(tiny_jamba, **options) as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        assert any(isinstance(layer, cpu_mamba.CpuMambaMixer) for layer in model.modules())
        assert answers(llm) == expected
        assert answers(llm) == expected  # with prefix caching: from hits
        hits = sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
        assert bool(hits) == options.get("enable_prefix_caching", False)


def test_mamba2_with_prefix_caching_answers_as_transformers_does(tmp_path):
    """Stock vLLM stops here at the first prompt longer than a block."""
    folder = str(write_tiny_nemotron_h(tmp_path))
    with engine(folder, enable_prefix_caching=True) as llm:
        first, second = answers(llm), answers(llm)
    assert first == transformers_answers(folder)
    assert second == first


def test_jamba_without_attention_or_norms_is_a_mamba(tiny_mamba):
    """The layer serves a model with neither experts nor inner norms."""
    with engine(tiny_mamba) as llm:
        assert answers(llm) == transformers_answers(tiny_mamba)


@pytest.mark.parametrize("state", ["auto", "bfloat16"])
def test_bf16_stays_close_to_fp32(tiny_mamba, state):
    """The first answer token's logits, which bf16 moves by a rounding and a bug by much more."""
    model = AutoModelForCausalLM.from_pretrained(tiny_mamba, dtype=torch.float32)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=model.config.vocab_size)
    batch = [{"prompt_token_ids": prompt} for prompt in prompts()]
    options = {"max_logprobs": model.config.vocab_size, "mamba_ssm_cache_dtype": state}
    with engine(tiny_mamba, dtype="bfloat16", **options) as llm:
        outputs = llm.generate(batch, params, use_tqdm=False)
    for prompt, output in zip(prompts(), outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        found = output.outputs[0].logprobs[0]
        assert max(abs(found[i].logprob - logits[i].item()) for i in range(len(logits))) < 0.15


def test_register_is_idempotent_and_for_the_cpu_only():
    code = (
        "from vllm.platforms import current_platform\n"
        "from vllm.model_executor.custom_op import op_registry_oot as layers\n"
        "from avmp_vllm.engine.cpu.mamba import register\n"
        "current_platform.is_cpu = lambda: False\n"
        "register(); assert not layers, layers\n"
        "del current_platform.is_cpu\n"
        "register(); register(); assert len(layers) == 2, layers\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
