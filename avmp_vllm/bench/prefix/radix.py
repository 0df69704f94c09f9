"""A radix tree of page keys, whose nodes may hold a state at their end.

Keys stand for whole prefixes, so where a prompt leaves a node's pages is found by bisection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Node:
    """Pages ``[start, end)`` of a prefix, behind its parent's.

    Attributes:
        parent: None of the root.
        keys: Pages of a whole sequence through this node.
        start, end: Which of these are the node's.
        children: By the key of their first page.
        state: Tokens that the state at its end stands for; 0 if there is none.
        used: When it was used last.
        state_used: When its state was.
    """

    __slots__ = ("children", "end", "keys", "parent", "start", "state", "state_used", "used")

    def __init__(self, parent: Node | None, keys: Sequence[int], start: int, end: int) -> None:
        self.parent = parent
        self.keys = keys
        self.start, self.end = start, end
        self.children: dict[int, Node] = {}
        self.state = 0
        self.used = self.state_used = 0

    @property
    def pages(self) -> int:
        """Pages of its own."""
        return self.end - self.start

    def shared(self, keys: Sequence[int], limit: int) -> int:
        """Where a sequence of ``limit`` pages leaves this node, from ``start`` to ``end``."""
        low, high = self.start, min(self.end, limit)
        mine = self.keys
        while low < high:
            middle = (low + high + 1) // 2
            if mine[middle - 1] == keys[middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low


class Radix:
    """The tree.

    Attributes:
        pages: In all nodes.
        states: Nodes with a state.
    """

    def __init__(self) -> None:
        self.root = Node(None, (), 0, 0)
        self.pages = 0
        self.states = 0

    def match(self, keys: Sequence[int], limit: int) -> tuple[list[Node], int]:
        """Nodes that a sequence's first ``limit`` pages pass, the last perhaps in part.

        Returns:
            The nodes below the root, and the pages that are known.
        """
        node, depth, path = self.root, 0, []
        while depth < limit:
            child = node.children.get(keys[depth])
            if child is None:
                break
            path.append(child)
            depth = child.shared(keys, limit)
            if depth < child.end:
                break
            node = child
        return path, depth

    def insert(self, keys: Sequence[int], count: int, now: int) -> tuple[Node, int]:
        """Enter a sequence's first ``count`` pages; a node ends behind them.

        Returns:
            That node, and how many pages are new.
        """
        path, depth = self.match(keys, count)
        node = path[-1] if path else self.root
        if depth < node.end:
            node = self.split(node, depth)
        new = count - depth
        if new:
            leaf = Node(node, keys, depth, count)
            leaf.used = now
            node.children[keys[depth]] = leaf
            self.pages += new
            node = leaf
        return node, new

    def split(self, node: Node, at: int) -> Node:
        """Divide a node; the upper part is new, has no state, and is returned."""
        parent = node.parent
        assert parent is not None
        assert node.start < at < node.end
        upper = Node(parent, node.keys, node.start, at)
        upper.used, upper.state_used = node.used, node.state_used
        parent.children[node.keys[node.start]] = upper
        upper.children[node.keys[at]] = node
        node.parent, node.start = upper, at
        return upper

    def set_state(self, node: Node, tokens: int, now: int) -> None:
        """Put a state at a node's end."""
        assert not node.state
        assert node.parent is not None
        node.state, node.state_used = tokens, now
        self.states += 1

    def drop_state(self, node: Node) -> None:
        """Give a node's state up."""
        assert node.state
        node.state = 0
        self.states -= 1

    def drop_leaf(self, node: Node) -> Node:
        """Give a leaf's pages and state up; return its parent."""
        parent = node.parent
        assert parent is not None
        assert not node.children
        if node.state:
            self.drop_state(node)
        del parent.children[node.keys[node.start]]
        self.pages -= node.pages
        node.parent = None
        return parent

    def join(self, node: Node) -> Node:
        """Let the only child of a node without state take its pages over; return the child."""
        parent = node.parent
        assert parent is not None
        assert not node.state
        (child,) = node.children.values()
        child.parent, child.start = parent, node.start
        parent.children[node.keys[node.start]] = child
        node.children, node.parent = {}, None
        return child

    def nodes(self) -> Iterator[Node]:
        """All nodes below the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def verify(self) -> None:
        """Raise AssertionError if the books do not add up."""
        nodes = list(self.nodes())
        assert self.pages == sum(node.pages for node in nodes)
        assert self.states == sum(bool(node.state) for node in nodes)
        for node in nodes:
            assert node.pages > 0
            assert node.parent is not None
            assert node.start == node.parent.end
            assert node.parent.children[node.keys[node.start]] is node
