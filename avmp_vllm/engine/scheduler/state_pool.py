"""The pool of SSM blocks: what position each state stands at, and what may be published.

A KV page is full or not. A state has a position: it is the state after so many tokens of its
request, and good for a prefix of exactly that length. vLLM derives the position from a block's
place in its request's table, which is right as long as every prefill chunk ends at the end of a
block. It does not where a request resumes inside of a block, or where a chunk has no room to reach
the end. Here the position is kept beside the block, and a hash that promises another is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avmp_vllm.engine.scheduler.block_pool import AVMPBlockPool

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock
    from vllm.v1.request import Request

    from avmp_vllm.engine.scheduler.checkpoints import Checkpoints


class StatePool(AVMPBlockPool):
    """SSM blocks.

    Attributes:
        checkpoints: What decides which states are published and kept; None where vLLM's own rules
            do.
        positions: Block id to the tokens that its state covers, once the step that has been
            scheduled last has run. Blocks that are free may have an old entry.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.positions: dict[int, int] = {}
        self.checkpoints: Checkpoints | None = None

    def cache_full_blocks(
        self,
        request: Request,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: list[bool] | None = None,
    ) -> None:
        """Publish the blocks among these whose states stand at their ends."""
        name, checkpoints = request.request_id, self.checkpoints
        at_end = [
            self.positions.get(blocks[number].block_id) == (end := (number + 1) * block_size)
            and (
                checkpoints.wants(name, end)
                if checkpoints is not None
                else block_mask is None or block_mask[number - num_cached_blocks]
            )
            for number in range(num_cached_blocks, num_full_blocks)
        ]
        super().cache_full_blocks(
            request,
            blocks,
            num_cached_blocks,
            num_full_blocks,
            block_size,
            kv_cache_group_id,
            at_end,
        )

    def cache_partial_block(
        self,
        request: Request,
        block: KVCacheBlock,
        num_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> BlockHashWithGroupId | None:
        """Publish a block under a prefix that ends inside of it, if its state stands there."""
        if self.positions.get(block.block_id) != num_tokens:
            return None
        return super().cache_partial_block(request, block, num_tokens, *args, **kwargs)

    def publish(self, block: KVCacheBlock, name: BlockHashWithGroupId, position: int) -> None:
        """Enter a block under a hash that another one had."""
        block._block_hash = name
        block._block_hash_num_tokens = position
        self.positions[block.block_id] = position
        self.cached_block_hash_to_block.insert(name, block)

    def move_block_hashes(self, src_block: KVCacheBlock, dst_block: KVCacheBlock) -> None:
        """Publish a copy in the place of a block that is overwritten."""
        super().move_block_hashes(src_block, dst_block)
        if self.checkpoints is not None:
            self.checkpoints.renamed(src_block.block_id, dst_block.block_id)

    def _maybe_evict_cached_block(self, block: KVCacheBlock) -> bool:
        if self.checkpoints is not None:
            self.checkpoints.unpublished(block.block_id)
        return super()._maybe_evict_cached_block(block)

    def misplaced(self) -> list[str]:
        """Published blocks whose state stands elsewhere than their hash says; there are none."""
        return [
            f"state {block.block_id} is published for {block.block_hash_num_tokens} tokens and "
            f"stands at {self.positions.get(block.block_id)}"
            for block in self.blocks
            if block.block_hash is not None
            and self.positions.get(block.block_id) != block.block_hash_num_tokens
        ]
