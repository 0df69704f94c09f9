"""Which conversation a prompt goes on with, found by the hashes of its prefix.

vLLM chains the hashes of a request's full blocks, so the last one names everything before it. A
finished request leaves its length under the hash of its last full block, prompt and answer; the
next turn's prompt holds that block, hence that hash.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """A finished answer of a conversation.

    Attributes:
        tokens: Its length.
        turn: How many answers the conversation has had with it.
    """

    tokens: int
    turn: int


class Conversations:
    """The latest answers by the hash of their last full block.

    Args:
        most: Conversations that are remembered; the least recently used one is forgotten.
        most_hashes: Blocks of a prompt that are looked up, from its end.
    """

    def __init__(self, most: int = 8192, most_hashes: int = 512) -> None:
        self._most = most
        self._most_hashes = most_hashes
        self._ended: OrderedDict[Hashable, Turn] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ended)

    def look_up(self, hashes: Sequence[Hashable]) -> Turn | None:
        """The longest known conversation that a prompt with these block hashes goes on with."""
        ended = self._ended
        recent = hashes[-self._most_hashes :]
        if not ended or ended.keys().isdisjoint(recent):  # most prompts begin a conversation
            return None
        for name in reversed(recent):
            if name in ended:
                ended.move_to_end(name)
                return ended[name]
        return None

    def note(self, hashes: Sequence[Hashable], tokens: int, turn: int) -> None:
        """Remember a finished answer.

        Args:
            hashes: Of the full blocks of prompt and answer; without any, nothing is noted.
            tokens: Of the answer.
            turn: How many answers the conversation has had with it.
        """
        if not hashes:
            return
        name = hashes[-1]
        self._ended[name] = Turn(tokens, turn)
        self._ended.move_to_end(name)
        if len(self._ended) > self._most:
            self._ended.popitem(last=False)
