"""A worker without a model, whose memory shows what a model would read.

A token's place in the cache holds a digest of the request's tokens up to it, and so does every cell
of a state. Each step checks what it reads against the tokens themselves before it writes, so a page
that was lost, moved wrongly, shared wrongly or published under the wrong hash is found at the first
read. The arena is one array under both views, as on a device: pages and states that overlap destroy
each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.model_executor.layers.mamba.checkpoint import compute_mamba_prefill_checkpoints
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.outputs import ModelRunnerOutput

from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.core import Kind, MovePlan, Recode, Save
from avmp_vllm.engine.layout.arena import AVMPCacheConfig
from avmp_vllm.engine.layout.groups import kind_of_spec
from avmp_vllm.engine.layout.message import PLAN

#: Token ids are 1 to this; a small number, so that prompts and answers often meet.
VOCABULARY = 7
END_OF_ANSWER = 0

_MIX = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class WrongContent(AssertionError):
    """A place of the cache does not hold what its reader or its hash says."""


class Digests:
    """Digests of every prefix of a request's tokens.

    Args:
        salt: Of the request; equal tokens under different salts have nothing in common.
    """

    def __init__(self, salt: str | None) -> None:
        self.of = [sum(map(ord, salt or "")) * _MIX & _MASK | 1]
        self._tokens: list[int] = []

    def follow(self, tokens: list[int]) -> None:
        """Bring the digests up to these tokens."""
        old = self._tokens
        if tokens[: len(old)] != old:
            kept = next(
                (i for i, (a, b) in enumerate(zip(old, tokens, strict=False)) if a != b),
                min(len(old), len(tokens)),
            )
            del old[kept:], self.of[kept + 1 :]
        for token in tokens[len(old) :]:
            self.of.append(((self.of[-1] ^ (token + 1)) * _MIX + (self.of[-1] >> 29)) & _MASK)
            old.append(token)


def next_token(digest: int) -> int:
    """What the model says after a prefix; now and then it ends its answer."""
    value = (digest * _MIX & _MASK) >> 40
    return END_OF_ANSWER if value % 37 == 0 else 1 + value % VOCABULARY


@dataclass
class Row:
    """What a worker knows of a request."""

    tokens: list[int]
    digests: Digests
    blocks: tuple[list[int], ...]
    computed: int


@dataclass
class Layout:
    """How cache groups lie in memory; both views start at its first cell.

    Attributes:
        kv_tokens: Tokens of a KV page.
        kv_group: Index of the attention group.
        ssm: Spec of the SSM layers.
        ssm_group: Index of the SSM group.
        kv: ``uint64[pages, page tokens, cells]``.
        states: ``uint64[blocks, cells]``.
    """

    kv_tokens: int
    kv_group: int
    ssm: MambaSpec
    ssm_group: int
    kv: np.ndarray = field(repr=False)
    states: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, config: KVCacheConfig) -> Layout:
        """Allocate the memory of a configuration with one layer of each kind."""
        kinds = [kind_of_spec(group.kv_cache_spec) for group in config.kv_cache_groups]
        kv_group, ssm_group = kinds.index(Kind.KV), kinds.index(Kind.SSM)
        kv = config.kv_cache_groups[kv_group].kv_cache_spec
        ssm = config.kv_cache_groups[ssm_group].kv_cache_spec
        assert isinstance(ssm, MambaSpec)
        size = max(tensor.size for tensor in config.kv_cache_tensors)
        memory = np.zeros(size // 8, dtype=np.uint64)
        geometry = config.own if isinstance(config, AVMPCacheConfig) else None
        page = kv.page_size_bytes // 8
        state = geometry.block_bytes // 8 if geometry else page
        pages, blocks = len(memory) // page, len(memory) // state
        return cls(
            kv.block_size,
            kv_group,
            ssm,
            ssm_group,
            memory[: pages * page].reshape(pages, kv.block_size, -1),
            memory[: blocks * state].reshape(blocks, state),
        )


class SimulatedWorker:
    """Executes scheduler outputs of stock vLLM or of AVMP.

    Args:
        config: Of the scheduler.
        hash_block_size: Tokens of a block hash.
        hit_alignment: Tokens that prefix hits are multiples of.
        salts: Of each request, by name; the scheduler does not send them.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        hash_block_size: int,
        hit_alignment: int,
        salts: dict[str, str | None],
    ) -> None:
        self.layout = Layout.of(config)
        self.hash_block_size = hash_block_size
        self.hit_alignment = hit_alignment
        self.salts = salts
        self.rows: dict[str, Row] = {}
        self.reads = 0
        self._state_column: dict[str, int] = {}
        is_arena = isinstance(config, AVMPCacheConfig)
        self.table = PageTable(config.own) if is_arena else None
        self._shift = config.shift if is_arena else (0, 0)
        self._plans = 0
        self.saved = 0
        self.recoded = 0
        self._saves: dict[int, list[Save]] = {}

    # -- places ------------------------------------------------------------------------------------

    def physical(self, block_id: int) -> int:
        """Where a block id of the scheduler lies."""
        return self.table.physical(block_id) if self.table else block_id

    def state(self, block_id: int) -> np.ndarray:
        """Cells of a state."""
        return self.layout.states[self.physical(block_id)]

    def page(self, block_id: int) -> np.ndarray:
        """Cells of a KV page, ``[tokens, cells]``."""
        return self.layout.kv[self.physical(block_id)]

    # -- a step ------------------------------------------------------------------------------------

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Do what a worker does with a step; return its tokens."""
        self._move(output)
        self._update_rows(output)
        names = list(output.num_scheduled_tokens)
        chunks = {
            name: (self.rows[name].computed, self.rows[name].computed + count)
            for name, count in output.num_scheduled_tokens.items()
        }
        self._carry_states(output, chunks)
        sampled = [self._forward(name, *chunks[name]) for name in names]
        assert not self._saves, f"no chunk saves these: {self._saves}"
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
        )

    def _move(self, output: SchedulerOutput) -> None:
        """Relocate, zero and copy pages."""
        layout = self.layout
        if self.table is None:
            for block in output.new_block_ids_to_zero or ():
                layout.kv[block] = 0
            for copy in output.kv_cache_block_copies or ():
                layout.states[copy.dst_block_id] = layout.states[copy.src_block_id]
            return
        plan: MovePlan | None = getattr(output, PLAN)
        self._saves = {}
        if plan is None:
            return
        self._plans += 1
        assert plan.number == self._plans, "a move plan was lost"
        plan = plan.shifted(self._shift)
        views = {Kind.KV: layout.kv, Kind.SSM: layout.states}
        for relocations, recode in plan.in_order():
            for move in relocations:
                views[move.kind][move.target] = views[move.kind][move.source].copy()
            if recode is not None:
                self._recode(recode)
        self.table.apply(plan.relocations)
        for page in plan.zeros:
            layout.kv[page] = 0
        for copy in plan.copies:
            views[copy.kind][copy.target] = views[copy.kind][copy.source]
        for save in plan.saves:
            self._saves.setdefault(save.running, []).append(save)
        if plan.digest is not None:
            known, digest = plan.digest
            assert self.table.digest(dict(zip(Kind, known, strict=True))) == digest

    def _recode(self, recode: Recode) -> None:
        """Encode a state into half a block's cells, or fill a block's cells from them."""
        states = self.layout.states
        half = states.shape[1] // 2
        part = slice(recode.half * half, (recode.half + 1) * half)
        if recode.encode:
            states[recode.target][part] = states[recode.source][:half].copy()
        else:
            states[recode.target][:] = np.resize(states[recode.source][part], states.shape[1])
        self.recoded += 1

    def _update_rows(self, output: SchedulerOutput) -> None:
        """Follow requests, as Model Runner V1 does."""
        cached = output.scheduled_cached_reqs
        for name in output.finished_req_ids:
            self.rows.pop(name, None)
        for name in (
            *output.finished_req_ids,
            *(output.preempted_req_ids or ()),
            *cached.resumed_req_ids,
        ):
            self._state_column.pop(name, None)
        for new in output.scheduled_new_reqs:
            tokens = list(new.prefill_token_ids or new.prompt_token_ids or ())
            row = Row(
                tokens, Digests(self.salts[new.req_id]), new.block_ids, new.num_computed_tokens
            )
            row.blocks = tuple(list(blocks) for blocks in new.block_ids)
            self.rows[new.req_id] = row
        for index, name in enumerate(cached.req_ids):
            row, blocks = self.rows[name], cached.new_block_ids[index]
            row.computed = cached.num_computed_tokens[index]
            if name in cached.resumed_req_ids:
                assert blocks is not None
                row.tokens = list(cached.all_token_ids[name])
                row.blocks = tuple(list(group) for group in blocks)
            elif blocks is not None:
                for ours, new_blocks in zip(row.blocks, blocks, strict=True):
                    ours.extend(new_blocks)
        for name in output.num_scheduled_tokens:
            self.rows[name].digests.follow(self.rows[name].tokens)

    def _carry_states(self, output: SchedulerOutput, chunks: dict[str, tuple[int, int]]) -> None:
        """Copy each running state to the block that the step updates, as ``preprocess_mamba``."""
        size = self.layout.ssm.block_size
        if self.layout.ssm.mamba_cache_mode != "align":
            return
        for name, (start, end) in chunks.items():
            column = cdiv(end, size) - 1
            before = self._state_column.get(name, (start - 1) // size)
            self._state_column[name] = column
            if before not in (-1, column):
                blocks = self.rows[name].blocks[self.layout.ssm_group]
                self.state(blocks[column])[:] = self.state(blocks[before])

    def _forward(self, name: str, start: int, end: int) -> list[int]:
        """Check what the chunk reads, write what it computes, and sample after the last token."""
        row, layout = self.rows[name], self.layout
        digests = row.digests.of
        assert start < end <= len(row.tokens), (
            f"{name}: chunk [{start}, {end}) of {len(row.tokens)}"
        )
        blocks = row.blocks[layout.ssm_group]
        align = layout.ssm.mamba_cache_mode == "align"
        column = cdiv(end, layout.ssm.block_size) - 1 if align else 0
        running = self.state(blocks[column])
        if start:
            self._expect(running, digests[start], f"{name} resumes at {start}: state")
        pages = row.blocks[layout.kv_group]
        tokens = layout.kv_tokens
        for index in range(cdiv(end, tokens)):
            page, first = self.page(pages[index]), index * tokens
            known = min(start - first, tokens)
            if known > 0:
                want = np.array(digests[first + 1 : first + known + 1], dtype=np.uint64)
                self._expect(page[:known], want[:, None], f"{name} at {start}: KV page {index}")
            last = min(end - first, tokens)
            begin = max(known, 0)
            if last > begin:
                new = np.array(digests[first + begin + 1 : first + last + 1], dtype=np.uint64)
                page[begin:last] = new[:, None]
        if layout.ssm.num_prefill_checkpoint_blocks and align:
            self._export(row, start, end)
        before = 0
        for save in self._saves.pop(blocks[column], ()):
            assert before < save.tokens < end - start, f"{name}: {save} in [{start}, {end})"
            self.state(save.target)[:] = digests[start + save.tokens]
            before = save.tokens
            self.saved += 1
        running[:] = digests[end]
        if end < len(row.tokens):
            return []
        token = next_token(digests[end])
        row.tokens.append(token)
        return [token]

    def _export(self, row: Row, start: int, end: int) -> None:
        """Save a state inside of the chunk where vLLM's layers do."""
        ssm = self.layout.ssm
        (offset,), (column,) = compute_mamba_prefill_checkpoints(
            [end],
            [end - start],
            hash_block_size=self.hash_block_size,
            mamba_block_size=ssm.block_size,
            checkpoint_alignment=ssm.prefill_checkpoint_alignment,
            drop_eagle_block=False,
            cache_hit_alignment_tokens=self.hit_alignment,
        )
        if offset:
            block = row.blocks[self.layout.ssm_group][column]
            self.state(block)[:] = row.digests.of[start + offset]

    def _expect(self, cells: np.ndarray, want: Any, what: str) -> None:
        self.reads += 1
        if not (cells == want).all():
            raise WrongContent(f"{what} holds other content")

    # -- the prefix cache --------------------------------------------------------------------------

    def check_published(self, scheduler: Any, prefixes: dict[bytes, tuple[list[int], int]]) -> None:
        """Check that every block in the prefix cache holds what its hash says.

        Args:
            scheduler: With the cache.
            prefixes: Of every hash ever made: the digests of its request and its length in tokens.
        """
        coordinator = scheduler.kv_cache_manager.coordinator
        pools = {id(m.block_pool): m.block_pool for m in coordinator.single_type_managers}
        for pool in pools.values():
            for key, entry in pool.cached_block_hash_to_block._cache.items():
                digests, length = prefixes[bytes(key[:-4])]
                group = int.from_bytes(key[-4:], "big")
                for block in entry.values() if isinstance(entry, dict) else (entry,):
                    what = f"published block {block.block_id}, {length} tokens of group {group}"
                    if group == self.layout.ssm_group:
                        self._expect(self.state(block.block_id), digests[length], what)
                        continue
                    count = (length - 1) % self.layout.kv_tokens + 1
                    want = np.array(digests[length - count + 1 : length + 1], dtype=np.uint64)
                    self._expect(self.page(block.block_id)[:count], want[:, None], what)
