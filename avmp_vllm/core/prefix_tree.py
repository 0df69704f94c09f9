"""The prefixes that are kept: states, and the KV pages that are good for something because of them.

A prefix hit needs a state at its end and every page before it. A node is a kept prefix: its state,
and the pages between the prefix that it was built upon and itself. Who resumes from a state builds
upon its node, so that pages belong to one node each::

    root --[pages]-- system prompt --[pages]-- conversation --[pages]-- its next turn
                                 \\-[pages]-- another conversation

A state that is given up leaves its pages to the nodes that are built upon it. When there are none,
nothing can use the pages any more, and they go with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Node:
    """A kept prefix.

    Attributes:
        parent: The prefix that it was built upon.
        position: Its tokens.
        pages: Between the parent's position and its own, in order.
        state: The state at its end, or None once that was given up.
        children: Nodes that were built upon it.
        users: Running requests that build upon it.
        note: Whatever the owner of the tree keeps about it.
    """

    __slots__ = ("children", "note", "pages", "parent", "position", "state", "users")

    def __init__(
        self, parent: Node | None, position: int, pages: list[int], state: int | None
    ) -> None:
        self.parent = parent
        self.position = position
        self.pages = pages
        self.state = state
        self.children: dict[Node, None] = {}
        self.users = 0
        self.note: Any = None

    @property
    def is_leaf(self) -> bool:
        """Whether its pages are good for its own state alone."""
        return not (self.children or self.users)


class Tidied(NamedTuple):
    """What has become of a node that lost its state or its last user.

    Attributes:
        lost: Pages that nothing can use any more.
        changed: Nodes of which more or fewer pages depend now.
    """

    lost: list[int]
    changed: list[Node]


class PrefixTree:
    """All kept prefixes.

    Attributes:
        root: The empty prefix, which costs nothing and is never given up.
    """

    def __init__(self) -> None:
        self.root = Node(None, 0, [], None)

    def add(self, parent: Node, position: int, pages: Sequence[int], state: int) -> Node:
        """Keep a prefix.

        Args:
            parent: What it was built upon.
            position: Its tokens.
            pages: Those after the parent's, up to the position.
            state: The state at the position.
        """
        assert parent.position < position
        node = Node(parent, position, list(pages), state)
        parent.children[node] = None
        return node

    def ancestor(self, node: Node) -> Node:
        """The nearest prefix with a state that a node was built upon, or the root."""
        above = node.parent
        assert above is not None, "the root has no ancestor"
        while above.state is None and above.parent is not None:
            above = above.parent
        return above

    def descendants(self, node: Node) -> Iterator[Node]:
        """The nearest prefixes with states that were built upon a node."""
        ahead = list(node.children)
        while ahead:
            below = ahead.pop()
            if below.state is None:
                ahead.extend(below.children)
            else:
                yield below

    def give_up(self, node: Node) -> Tidied:
        """Give a node's state up."""
        node.state = None
        return self.tidy(node)

    def tidy(self, node: Node) -> Tidied:
        """Remove a node without a state if nothing needs it apart from another."""
        lost: list[int] = []
        heir: Node | None = None
        while node.state is None and not node.users and node.parent is not None:
            above = node.parent
            if len(node.children) > 1:
                break
            del above.children[node]
            if node.children:
                (heir,) = node.children
                heir.pages[:0] = node.pages
                heir.parent = above
                above.children[heir] = None
                break
            lost[:0] = node.pages
            node = above
        return Tidied(lost, [other for other in (heir, node, node.parent) if other is not None])

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root."""
        ahead = list(self.root.children)
        while ahead:
            node = ahead.pop()
            yield node
            ahead.extend(node.children)

    def problems(self) -> list[str]:
        """What does not add up; nothing, unless there is a mistake."""
        found = []
        for node in self.nodes():
            assert node.parent is not None
            where = f"prefix of {node.position} tokens"
            if node not in node.parent.children:
                found.append(f"{where} is not among its parent's children")
            if node.position <= node.parent.position:
                found.append(f"{where} is not longer than its parent")
            if node.state is None and not node.users and len(node.children) < 2:
                found.append(f"{where} has no state and is needed by {len(node.children)}")
        return found
