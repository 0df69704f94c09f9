"""What a prefix cache is to this benchmark, and what it may know.

A cache serves one request after the other. ``serve`` looks the prompt up, then does to the cache
whatever that system does while it computes the rest and answers: makes states, publishes pages,
evicts. Bytes are those of cached pages and states alone; a request that runs holds nothing, unless
`overlap` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from avmp_vllm.bench.prefix.trace import PAGE, Request
from avmp_vllm.core.capacity import STATE_ALIGNMENT, stock_block_tokens, stock_groups
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.models.shapes import ModelShape

#: Tokens that stock vLLM's block is a multiple of, and with a latent (MLA) cache.
STOCK_UNIT, LATENT_UNIT = 16, 128
#: Most prompt tokens of a step.
STEP_TOKENS = 8192


@dataclass(frozen=True)
class Sizes:
    """What a model's pages and states weigh.

    Attributes:
        page: Bytes of ``PAGE`` tokens in all attention layers.
        state: Bytes of one sequence's state in all SSM layers.
        block_tokens: Tokens of stock vLLM's block.
        block: Bytes of one such block.
        kv_blocks: Blocks that hold ``block_tokens`` tokens in all attention layers.
        state_blocks: Blocks that hold one state in all SSM layers.
    """

    page: int
    state: int
    block_tokens: int
    block: int
    kv_blocks: int
    state_blocks: int

    @classmethod
    def of(cls, shape: ModelShape, kv_dtype: str = "auto") -> Sizes:
        """Sizes of a model."""
        token = shape.token_bytes(kv_dtype)
        unit = LATENT_UNIT if shape.latent else STOCK_UNIT
        block_tokens = stock_block_tokens(1, token, shape.state_bytes, unit)
        layers, kv_groups, ssm_groups = stock_groups(shape.kv_layers, shape.ssm_layers)
        state = ceil_div(shape.state_bytes, STATE_ALIGNMENT) * STATE_ALIGNMENT
        return cls(
            page=PAGE * token * shape.kv_layers,
            state=state * shape.ssm_layers,
            block_tokens=block_tokens,
            block=layers * block_tokens * token,
            kv_blocks=kv_groups,
            state_blocks=ssm_groups,
        )


class Served(NamedTuple):
    """What serving one request came to.

    Attributes:
        hit: Prompt tokens that were not computed.
        cuts: Ends of prompt chunks that computing alone would not have needed: further steps.
        states: States that were made to be kept.
        evicted_states: Cached states that were given up.
        evicted_pages: Cached pages of ``PAGE`` tokens that were given up.
        copied_states: Copies of a running state, while answering or at a cut.
        kind: Of the state that was hit, in the cache's own words; empty for a miss.
    """

    hit: int
    cuts: int = 0
    states: int = 0
    evicted_states: int = 0
    evicted_pages: int = 0
    copied_states: int = 0
    kind: str = ""


class Cache(Protocol):
    """One system's rules.

    A class is made with the bytes of the cache and the model's sizes: ``make(memory, sizes)``.
    """

    def serve(self, request: Request) -> Served:
        """Look a request up, compute the rest, answer, and keep what the system keeps."""
        ...

    def probe(self, request: Request) -> int:
        """Prompt tokens that a request would hit now; changes nothing."""
        ...

    def hold(self, pages: int, states: int) -> None:
        """So much memory is with requests that run, and not with the cache.

        What is cached is given up where the next request needs the room, not here.
        """
        ...

    def bytes_used(self) -> int:
        """Bytes of cached pages and states; never more than the memory."""
        ...

    def verify(self) -> None:
        """Raise AssertionError if the books do not add up."""
        ...
