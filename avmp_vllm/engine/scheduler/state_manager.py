"""vLLM's manager of SSM states, which also says where each state stands.

vLLM's logic decides which block a step updates, copies or saves a state into; this follows it and
notes the positions in the pool, which publishes nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from avmp_vllm.core import Save
from avmp_vllm.engine.layout.groups import saves_anywhere
from avmp_vllm.engine.scheduler.state_pool import StatePool

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock
    from vllm.v1.request import Request

    from avmp_vllm.engine.scheduler.checkpoints import Checkpoints

#: Role of the cache groups that this manager is for; vLLM looks managers up by it.
ROLE = "avmp_states"
#: Why states are copied.
COPY_CAUSES = ("answer", "prompt")


class Saved(NamedTuple):
    """A state that a chunk of the step being scheduled is to save.

    Attributes:
        running: The block that the chunk updates.
        target: The block that gets the state.
        position: Tokens of the request that the state covers.
        tokens: Of the chunk that it covers.
    """

    running: KVCacheBlock
    target: KVCacheBlock
    position: int
    tokens: int


class StateManager(MambaManager):
    """Manages the SSM blocks of all requests.

    Attributes:
        checkpoints: What decides which states are kept; None where vLLM's own rules do.
        tables: KV pages of each request, for each block table with a page for every so many tokens.
        copied: Copies of states so far, by cause: of a running answer, to keep it; of a state that
            a prompt has made or begins at, before it is overwritten.
        saved: States so far that layers have saved inside of a chunk, into blocks from here.
        offers: Whether a KV connector is told of each state that stays where it is.
    """

    block_pool: StatePool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.checkpoints: Checkpoints | None = None
        self.tables: Sequence[Mapping[str, Sequence[KVCacheBlock]]] = ()
        self.copied = dict.fromkeys(COPY_CAUSES, 0)
        self.saved = 0
        self.offers = False
        self._anywhere = saves_anywhere(self.kv_cache_spec)
        # Where a chunk begins that is about to get blocks, and positions inside of it whose states
        # it is to save.
        self._inside: dict[str, tuple[int, list[int]]] = {}
        # Of the step being scheduled: what its chunks save, and blocks to let go of at its end.
        self._saves: dict[str, list[Saved]] = {}
        self._to_free: list[KVCacheBlock] = []
        # Where the state of a running answer stands that is to be copied, and its copy.
        self._due: dict[str, int] = {}
        self._copies: dict[str, tuple[int, KVCacheBlock]] = {}

    # -- blocks ------------------------------------------------------------------------------------

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks for a chunk, and one for each state that it saves or that is copied before it."""
        count = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap=apply_admission_cap,
            prefill_end=prefill_end,
        )
        if self.checkpoints is None or apply_admission_cap:
            return count
        if self._anywhere:
            start, end = total_computed_tokens, num_tokens_main_model
            inside = self.checkpoints.inside(request_id, start, end)
            self._inside[request_id] = start, inside
            count += len(inside)
        self._due.pop(request_id, None)
        if (
            request_id in self._allocated_block_reqs
            and request_id not in self._partial_hit_reqs
            and self.position(request_id) == total_computed_tokens
            and self.checkpoints.answer_due(request_id, total_computed_tokens)
        ):
            self._due[request_id] = total_computed_tokens
            count += 1
        return count

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocate a chunk's blocks and note where its states will stand.

        What a KV connector brings comes as a chunk without tokens, at the end of what it brings.

        Args:
            request_id: Whose.
            num_tokens: Tokens with slots.
            num_tokens_main_model: Where the chunk ends.
        """
        self._copy_answer(request_id)
        queued = len(self._pending_cow_copies)
        new = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        blocks, positions = self.req_to_blocks[request_id], self.block_pool.positions
        self.copied["prompt"] += len(self._pending_cow_copies) - queued
        for source, target in self._pending_cow_copies[queued:]:
            positions[target.block_id] = positions[source.block_id]
        if self.mamba_cache_mode == "align" and request_id in self._checkpoints:
            position, index = self._checkpoints[request_id]
            positions[blocks[index].block_id] = position
        running = blocks[cdiv(num_tokens_main_model, self.block_size) - 1]
        positions[running.block_id] = num_tokens_main_model
        self._save_inside(request_id, running)
        return new

    def _save_inside(self, request_id: str, running: KVCacheBlock) -> None:
        """Find blocks for the states that a chunk is to save."""
        start, inside = self._inside.pop(request_id, (0, []))
        if not inside:
            return
        blocks = self.block_pool.get_new_blocks(len(inside))
        self._saves[request_id] = [
            Saved(running, block, position, position - start)
            for position, block in zip(inside, blocks, strict=True)
        ]
        self._to_free += blocks
        for save in self._saves[request_id]:
            self.block_pool.positions[save.target.block_id] = save.position

    def take_saves(self) -> list[Save]:
        """Drain what the step's chunks save, and let go of its blocks: published ones stay.

        Nothing is allocated any more before the workers have their plan.
        """
        saves = [
            Save(save.running.block_id, save.target.block_id, save.tokens)
            for chunk in self._saves.values()
            for save in chunk
        ]
        self.saved += len(saves)
        self._saves.clear()
        free, self._to_free = self._to_free, []
        self.block_pool.free_blocks(free)
        return saves

    def lose_chunk(self, request_id: str) -> None:
        """A chunk is not computed after all, and what it was to save is not published."""
        for save in self._saves.pop(request_id, ()):
            self.block_pool._maybe_evict_cached_block(save.target)

    def _copy_answer(self, request_id: str) -> None:
        """Copy the state of a running answer before the chunk overwrites it, if that is due."""
        position = self._due.pop(request_id, None)
        if position is None:
            return
        source = self.req_to_blocks[request_id][-1 - self.num_speculative_blocks]
        (copy,) = self.block_pool.get_new_blocks(1)
        self._pending_cow_copies.append((source, copy))
        self.copied["answer"] += 1
        # Both are let go of once the copy is in the plan; the copy stays for its hash.
        source.ref_cnt += 1
        self.block_pool.positions[copy.block_id] = position
        self._copies[request_id] = position, copy

    def position(self, request_id: str) -> int:
        """Tokens that a request's running state covers, once all scheduled steps have run."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return 0
        return self.block_pool.positions[blocks[-1 - self.num_speculative_blocks].block_id]

    def settled(self, request_id: str, tokens: int) -> KVCacheBlock | None:
        """The block of a running state, if nothing else is to be done for its request yet.

        Args:
            request_id: Whose.
            tokens: That the state covers once all scheduled steps have run.

        Returns:
            None if a state is to be copied or saved, or an old one to be let go of.
        """
        pending = (self._due, self._copies, self._inside, self._saves, self._partial_hit_reqs)
        if any(request_id in one for one in pending):
            return None
        if self.mamba_cache_mode == "align" and request_id in self._checkpoints:
            return None
        blocks = self.req_to_blocks[request_id]
        index = cdiv(tokens, self.block_size) - 1
        if any(not block.is_null for block in blocks[:index]):
            return None
        return blocks[index]

    def moves(self, tokens: int) -> bool:
        """Whether any running state needs a new block within so many tokens, or for its prompt."""
        assert self.checkpoints is not None
        size = self.block_size
        for request_id in self.req_to_blocks:
            position = self.position(request_id)
            end = max(position + max(tokens, 1), self.checkpoints.prompt_end(request_id))
            # vLLM's tables have an empty entry for who has asked and got nothing.
            if position and cdiv(end, size) > cdiv(position, size):
                return True
        return False

    def passing(self, request_id: str) -> int:
        """Blocks of the next chunk that its request lets go of when the step is scheduled."""
        return len(self._inside.get(request_id, (0, ()))[1]) if self._inside else 0

    def forgo(self, request_id: str) -> int:
        """Give up what a step would save for later requests alone.

        Where bytes are short it is not worth a preemption. A state inside of the chunk is not
        saved; the state at the prompt's last page is overwritten without a copy, and its hash goes.

        Returns:
            Blocks that the step needs less.
        """
        if self.mamba_cache_mode != "align":
            return 0
        less = int(self._checkpoints.pop(request_id, None) is not None)
        less += int(self._due.pop(request_id, None) is not None)
        less += len(self._inside.pop(request_id, (0, []))[1])
        if request_id in self._partial_hit_reqs and request_id in self._allocated_block_reqs:
            _, state = self._partial_hit_reqs.pop(request_id)
            self._producer_partial_tail_reqs.pop(request_id, None)
            self.block_pool._maybe_evict_cached_block(state)
            less += 1
        return less

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request; its blocks."""
        self.lose_chunk(request_id)
        self._inside.pop(request_id, None)
        self._due.pop(request_id, None)
        self._copies.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    # -- the prefix cache --------------------------------------------------------------------------

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Publish what a chunk leaves, and tell the keeper of states."""
        self._publish_saves(request, num_tokens)
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(
            request,
            num_tokens,
            retention_interval=retention_interval,
            replay_boundaries=replay_boundaries,
        )
        if self.checkpoints is None:
            return
        blocks = self.req_to_blocks[request.request_id]
        for index in range(before, num_tokens // self.block_size):
            self._tell(request, blocks[index], (index + 1) * self.block_size)

    def _publish_saves(self, request: Request, num_tokens: int) -> None:
        """Publish what a chunk saves; what is not published need not be saved."""
        name = request.request_id
        published = []
        for save in self._saves.get(name, ()):
            assert save.position <= num_tokens, "states are saved inside of prompts"
            key = self._publish(request, save.target, save.position)
            if key is not None:
                self.cached_blocks_this_step.add(key)
                published.append(save)
        if name in self._saves:
            self._saves[name] = published

    def _cache_partial_tail_block(
        self, request: Request, num_tokens: int, retention_interval: int | None
    ) -> BlockHashWithGroupId | None:
        if self.checkpoints is None:
            return super()._cache_partial_tail_block(request, num_tokens, retention_interval)
        name = request.request_id
        if name in self._copies:
            # Now or never: nobody holds the copy any more once it is in the plan.
            position, copy = self._copies.pop(name)
            return self._publish(request, copy, position) if position <= num_tokens else None
        blocks = self.req_to_blocks[name]
        if name in self._checkpoints:
            position, index = self._checkpoints[name]
            if self.checkpoints.wants(name, position):
                return self._publish(request, blocks[index], position)
            return None
        index = cdiv(num_tokens, self.block_size) - 1
        if not self.checkpoints.wants(name, num_tokens) or not 0 <= index < len(blocks):
            return None
        state, moves_on = blocks[index], bool(num_tokens % self.block_size)
        published = self._publish(request, state, num_tokens, stays=not moves_on)
        if published is not None and moves_on:
            # The next chunk overwrites it; before that it is copied, and the copy offered.
            self._partial_hit_reqs[name] = index, state
            self.num_cached_block[name] = index
            if self.offers:
                self._producer_partial_tail_reqs[name] = state, num_tokens
        return published

    def _publish(
        self, request: Request, state: KVCacheBlock, position: int, stays: bool = True
    ) -> BlockHashWithGroupId | None:
        """Publish a state, unless there is one for the same prefix.

        One that stays where it is may be read from there: a KV connector is told.
        """
        block_hash = request.block_hashes[position // self.block_pool.hash_block_size - 1]
        if state.is_null or self.block_pool.get_cached_block(block_hash, [self.kv_cache_group_id]):
            return None
        published = self.block_pool.cache_partial_block(
            request, state, position, self.kv_cache_group_id, self.block_size
        )
        if published is not None:
            self._tell(request, state, position)
            if self.offers and stays:
                self._pending_boundary_state_offloads.append(
                    (request.request_id, self.kv_cache_group_id, state, position)
                )
        return published

    def _tell(self, request: Request, state: KVCacheBlock, position: int) -> None:
        if self.checkpoints is not None and state.block_hash_num_tokens == position:
            tables = [pages[request.request_id] for pages in self.tables]
            self.checkpoints.published(request, state, position, tables)


KVCacheSpecRegistry.register_role_manager(ROLE, StateManager)
