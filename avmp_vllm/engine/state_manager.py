"""vLLM's manager of SSM states, which also says where each state stands.

vLLM's logic decides which block a step updates, copies or saves a state into; this follows it and
notes the positions in the pool, which publishes nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from avmp_vllm.engine.state_pool import StatePool

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

#: Role of the cache groups that this manager is for; vLLM looks managers up by it.
ROLE = "avmp_states"


class StateManager(MambaManager):
    """Manages the SSM blocks of all requests."""

    block_pool: StatePool

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocate a chunk's blocks and note where its states will stand.

        Args:
            request_id: Whose.
            num_tokens: Tokens with slots.
            num_tokens_main_model: Where the chunk ends.
        """
        queued = len(self._pending_cow_copies)
        new = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        blocks, positions = self.req_to_blocks[request_id], self.block_pool.positions
        for source, target in self._pending_cow_copies[queued:]:
            positions[target.block_id] = positions[source.block_id]
        if self.mamba_cache_mode == "align" and request_id in self._checkpoints:
            position, index = self._checkpoints[request_id]
            positions[blocks[index].block_id] = position
        running = blocks[cdiv(num_tokens_main_model, self.block_size) - 1]
        positions[running.block_id] = num_tokens_main_model
        return new

    def position(self, request_id: str) -> int:
        """Tokens that a request's running state covers, once all scheduled steps have run."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return 0
        return self.block_pool.positions[blocks[-1 - self.num_speculative_blocks].block_id]

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
        if request_id in self._partial_hit_reqs and request_id in self._allocated_block_reqs:
            _, state = self._partial_hit_reqs.pop(request_id)
            self._producer_partial_tail_reqs.pop(request_id, None)
            self.block_pool._maybe_evict_cached_block(state)
            less += 1
        return less


KVCacheSpecRegistry.register_role_manager(ROLE, StateManager)
