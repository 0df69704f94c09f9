"""Kept states that are encoded before they would go, and decoded when a prompt begins at one.

The least of what is kept goes first. Before a whole state goes, it is encoded into half a block
beside another one, so that a block is free for every two of them, and what is encoded goes at its
turn. Nothing waits: the worker encodes and decodes between the relocations of a step's plan.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from avmp_vllm.core import ID_MASK, Arena, Recode
from avmp_vllm.core.cold import HALVES, ColdBlocks, half_of
from avmp_vllm.core.keeper import StateKeeper
from avmp_vllm.core.prefix_tree import Node

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId

    from avmp_vllm.engine.scheduler.state_pool import StatePool


class ColdStates:
    """Encoded states.

    Args:
        arena: The allocator.
        pool: Of SSM blocks.
        keeper: What decides which state is the least.
        nodes: Kept prefixes by their state: its block, or its slot (below zero) in one.
        page_tokens: Of a KV page, which is what hashes are made of.

    Attributes:
        blocks: That hold encoded states. Nobody references them, and vLLM's cache knows no hash of
            them.
        encoded: States so far that were encoded.
        decoded: Of these, states that were decoded.
    """

    def __init__(
        self,
        arena: Arena,
        pool: StatePool,
        keeper: StateKeeper,
        nodes: dict[int, Node],
        page_tokens: int,
    ) -> None:
        self.blocks = ColdBlocks()
        self.encoded = self.decoded = 0
        self._arena, self._pool, self._keeper = arena, pool, keeper
        self._nodes, self._page_tokens = nodes, page_tokens
        self._by_prefix: dict[Hashable, Node] = {}
        self._names: dict[int, BlockHashWithGroupId] = {}
        self._recodes: list[Recode] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def of(self, prefix: Hashable) -> Node | None:
        """The prefix whose state is encoded, by its hash; None if it is not."""
        return self._by_prefix.get(prefix)

    def take_recodes(self) -> list[Recode]:
        """Drain what the step's plan is to encode and decode."""
        recodes, self._recodes = self._recodes, []
        return recodes

    # -- encoding ----------------------------------------------------------------------------------

    def may_encode(self, node: Node) -> bool:
        """Whether a kept state is whole, in nobody's use, and worth it.

        Then its bytes are there when the plan is carried out: whatever the step being scheduled
        writes is referenced until its plan has been made.
        """
        state = node.state
        return (
            state is not None
            and state >= 0
            and self._arena.is_cached(state)
            and self._keeper.pays_at(node, 1 / HALVES)
        )

    def encode(self, node: Node) -> int | None:
        """Encode a kept state.

        Returns:
            Its block, which is of no use any more; None if another state is to join it there.
        """
        state = node.state
        assert state is not None
        name = self._pool.blocks[state & ID_MASK].block_hash
        assert name is not None
        slot = self.blocks.place()
        freed = None if slot is None else state
        if slot is None:
            slot = self.blocks.begin(state)
        self._note(state, slot, encode=True)
        del self._nodes[state]  # first: what the pool forgets is given up otherwise
        self._pool.evict((state,))
        self._names[slot] = name
        self._by_prefix[node.note.key] = node
        self._rename(node, slot, 1 / HALVES)
        self.encoded += 1
        return freed

    def _note(self, state: int, slot: int, encode: bool) -> None:
        """Note what the worker has to do where everything is now."""
        physical = self._arena.physical
        block, half = half_of(slot)
        whole, cold = physical(state), physical(block)
        source, target = (whole, cold) if encode else (cold, whole)
        self._recodes.append(Recode(self._arena.moved, source, target, half, encode))

    def _rename(self, node: Node, state: int, share: float) -> None:
        node.state = state
        self._nodes[state] = node
        self._keeper.takes(node, share)

    # -- decoding ----------------------------------------------------------------------------------

    def warm_up(self, hashes: Sequence[BlockHash], hit: int, longest: int) -> bool:
        """Decode the longest prefix beyond a hit whose state is encoded.

        Args:
            hashes: Of a prompt's pages.
            hit: Tokens that it finds without.
            longest: Tokens that it may find.

        Returns:
            Whether it finds more now.
        """
        if not self._by_prefix:
            return False
        page = self._page_tokens
        for index in range(min(longest // page, len(hashes)) - 1, hit // page - 1, -1):
            node = self._by_prefix.get(hashes[index])
            if node is not None:
                return self._decode(node)
        return False

    def _decode(self, node: Node) -> bool:
        """Decode a state into a block of its own, and publish it as it was."""
        slot = node.state
        assert slot is not None
        if not self._arena.fits(0, 1):
            return False
        (block,) = self._pool.get_new_blocks(1)
        if node.state != slot:  # it was itself the least
            self._pool.free_blocks([block])
            return False
        self._note(block.block_id, slot, encode=False)
        name = self._names[slot]
        del self._nodes[slot]
        if (freed := self.vacate(node)) is not None:
            self._arena.drop(freed)
        self._pool.publish(block, name, node.position)
        self._rename(node, block.block_id, 1.0)
        self._pool.free_blocks([block])
        self.decoded += 1
        return True

    # -- giving up ---------------------------------------------------------------------------------

    def vacate(self, node: Node) -> int | None:
        """Let go of an encoded state; its block, if that holds no other."""
        slot = node.state
        assert slot is not None
        del self._names[slot], self._by_prefix[node.note.key]
        return self.blocks.vacate(slot)

    def clear(self) -> None:
        """Hold nothing; the blocks are the caller's."""
        self.blocks.clear()
        self._names.clear()
        self._by_prefix.clear()

    def problems(self) -> list[str]:
        """What does not add up."""
        found = []
        slots = {state for state in self._nodes if state < 0}
        if slots != self._names.keys() or len(slots) != len(self.blocks):
            found.append(f"{len(slots)} encoded states are kept, {len(self.blocks)} are held")
        if {node.state for node in self._by_prefix.values()} != slots:
            found.append("encoded states are not found by their prefixes")
        for slot in slots:
            block, _ = half_of(slot)
            if block not in self.blocks or not self._arena.is_cached(block):
                found.append(f"encoded state {slot} is in block {block}, which is not kept")
        return found
