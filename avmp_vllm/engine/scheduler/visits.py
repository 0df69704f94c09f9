"""What is known of a request on its way through the tree of prefixes."""

from __future__ import annotations

from dataclasses import dataclass

from avmp_vllm.core.keeper import Origin, Record, Stops
from avmp_vllm.core.prefix_tree import Node


@dataclass
class Visit:
    """A running request's way through the tree.

    Attributes:
        node: The prefix that it builds upon.
        stops: States that it is to make, by their position.
        prompt: Tokens of its prompt.
        turns: States before its own in its conversation.
        found: The record of the state that it began with.
        answer: The state that moves on with its answer.
        loaded: Where the state stands that a connector brings, 0 if none does.
    """

    node: Node
    stops: dict[int, Origin]
    prompt: int
    turns: int
    found: Record | None = None
    answer: Node | None = None
    loaded: int = 0


@dataclass(frozen=True)
class Intent:
    """What a request that waits would do with its prompt; nothing is changed by it.

    Attributes:
        stops: States that pay and that do not; these are remembered, so that misses teach.
        turns: States before its own in its conversation.
        deepest: The longest prefix of a known state, kept or gone.
    """

    stops: Stops
    turns: int
    deepest: Record | None
