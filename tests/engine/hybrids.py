"""The families of hybrids that the tests serve, and what each needs to run on vLLM's CPU build."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mixed_jamba
import standins

from avmp_vllm.models import tiny_hybrids, tiny_latent

#: Of the mixed prompts: how many, tokens of an answer, and of the longest request.
COUNT, NEW_TOKENS, LONGEST = 8, 24, 320


@dataclasses.dataclass(frozen=True)
class Family:
    """A family in the tests.

    Attributes:
        write: Writes its tiny checkpoint.
        tight: Bytes of an arena in which the prompts preempt, migrate and relocate.
        tables: Block tables under AVMP.
        layouts: Of KV pages and of states.
        first_layout: Bytes of the first layout in a state, where there are several.
    """

    write: Callable[[Any], Any]
    tight: int
    tables: int = 2
    layouts: tuple[int, int] = (1, 1)
    first_layout: int = 0


def _mixed(name: str) -> Callable[[Any], Any]:
    return lambda path: mixed_jamba.write(path, name)


FAMILIES = {
    "nemotron_h": Family(tiny_hybrids.write_tiny_nemotron_h, 540_000),
    "falcon_h1": Family(tiny_hybrids.write_tiny_falcon_h1, 1_070_000),
    "zamba2": Family(tiny_hybrids.write_tiny_zamba2, 1_880_000),
    # One head, so that a page holds few states: or the states of all requests fit beside the pages.
    "lfm2": Family(partial(tiny_hybrids.write_tiny_lfm2, num_key_value_heads=1), 215_000),
    "qwen3_next": Family(tiny_hybrids.write_tiny_qwen3_next, 540_000),
    "qwen3_5": Family(tiny_hybrids.write_tiny_qwen3_5, 540_000),
    "kimi_linear": Family(tiny_latent.write_tiny_kimi_linear, 320_000),
    "bailing_2_5": Family(tiny_latent.write_tiny_bailing_2_5, 280_000),
    "mixed_kv": Family(_mixed("kv"), 1_300_000, layouts=(3, 1)),
    "mixed_states": Family(_mixed("states"), 1_100_000, layouts=(1, 3)),
    "mixed_window": Family(_mixed("window"), 1_350_000, tables=5, layouts=(4, 1)),
    # Two of four states are 256 channels with 16 state elements, and 3 of the convolution.
    "mixed_mixed": Family(
        _mixed("mixed"), 1_900_000, tables=3, layouts=(4, 3), first_layout=2 * 256 * (16 + 3) * 4
    ),
}


@contextlib.contextmanager
def layers_of(name: str) -> Iterator[None]:
    """Have engines that start here build a family's layers."""
    with standins.installed(name), contextlib.ExitStack() as stack:
        if name.startswith("mixed_"):
            stack.enter_context(mixed_jamba.installed())
        yield
