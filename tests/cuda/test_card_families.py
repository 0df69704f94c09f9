"""Every family of hybrids on a card, with the layers and kernels that vLLM has there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import mixed_jamba
import pytest
from enginelib import assert_nothing_held, counted, engine, greedy, mixed_prompts
from hybrids import COUNT, FAMILIES, LONGEST, NEW_TOKENS

from avmp_vllm.models import tiny_latent

_PROMPTS = mixed_prompts(1, COUNT)
#: Attempts of stock vLLM, the first that starts is compared with: fp32, and where its kernels for
#: the family take none, bf16, one request at a time so that nothing depends on a batch. Gated delta
#: nets by Triton, since vLLM's choice on Hopper needs FlashInfer.
_TRITON = {"gdn_prefill_backend": "triton"}
_ATTEMPTS: tuple[dict[str, Any], ...] = (
    _TRITON,
    {**_TRITON, "dtype": "bfloat16", "max_num_seqs": 1},
)
#: Sizes that vLLM's kernels of latent and of lightning attention take on a card, in bf16 alone.
_LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_WRITERS = {
    "kimi_linear": partial(tiny_latent.write_tiny_kimi_linear, **_LATENT),
    "bailing_2_5": partial(tiny_latent.write_tiny_bailing_2_5, **_LATENT, head_dim=64),
}
#: Arenas to those on CPUs, where a request holds fewer states: kernels there save none in a chunk.
_MORE = 1.1
#: Bytes where one request runs at a time.
_ONE_AT_A_TIME = 8 << 20


@contextlib.contextmanager
def layers_of(name: str) -> Iterator[None]:
    """The made-up Jambas need their layers; all others are vLLM's own."""
    with mixed_jamba.installed() if name.startswith("mixed_") else contextlib.nullcontext():
        yield


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_equal_stock(name, tmp_path):
    """In a tight arena, without a cache and with one in two rounds."""
    family, model = FAMILIES[name], str(tmp_path)
    _WRITERS.get(name, family.write)(model)
    refusals = []
    for options in _ATTEMPTS:
        try:
            with layers_of(name), engine(model, max_model_len=LONGEST, **options) as llm:
                expected = greedy(llm, _PROMPTS, NEW_TOKENS)
            break
        except Exception as error:
            refusals.append(f"{type(error).__name__}: {error}")
    else:
        pytest.skip(f"stock vLLM does not serve this here: {'; '.join(refusals)}")
    exact = "dtype" not in options
    avmp = {"page_tokens": 32, "checkpoint_tokens": 128, "admission": "growth", "growth_tokens": 0}
    found, did = [], []
    for caching in (False, True):
        with (
            layers_of(name),
            engine(
                model,
                avmp=avmp,
                max_model_len=LONGEST,
                kv_cache_memory_bytes=int(_MORE * family.tight) if exact else _ONE_AT_A_TIME,
                enable_prefix_caching=caching,
                **options,
            ) as llm,
        ):
            found.append(greedy(llm, _PROMPTS, NEW_TOKENS))
            if caching:
                found.append(greedy(llm, _PROMPTS[::-1], NEW_TOKENS)[::-1])
            assert_nothing_held(llm)
            did.append(counted(llm))
    # A hit leaves less to compute at once, which rounds otherwise in bf16.
    assert found[0] == expected
    assert not exact or found == [expected] * 3
    print(name, options, did)
    if exact:
        assert any(sum(one.statistics.relocations.values()) for one in did)
