"""Random calls on a tree of prefixes against a naive model: a dict of prefixes by their pages.

Controls at the end spoil the tree in the ways that a careless change could; each must be noticed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from avmp_vllm.core.prefix_tree import Node, PrefixTree, Tidied

#: Tokens of a page.
PAGE = 16
#: Page numbers of a prefix, by which the model knows it.
Pages = tuple[int, ...]


@dataclass
class Prefix:
    """What the model knows of a prefix.

    Attributes:
        node: Its node, which must be in the tree as long as the prefix is needed.
        state: Its state, None once that was given up.
        users: Running requests that build upon it.
    """

    node: Node
    state: int | None = None
    users: int = 0

    @property
    def needed(self) -> bool:
        """Whether its pages are."""
        return self.state is not None or self.users > 0


class Client:
    """Makes calls on a tree and on the model, and compares them.

    Attributes:
        prefixes: Those that are needed, and the empty one.
        merged: Nodes without states that have left pages to the node below them.
        lost: Pages that went.
        changed: Nodes of which other pages depended after a call.
    """

    def __init__(self) -> None:
        self.tree = PrefixTree()
        self.prefixes: dict[Pages, Prefix] = {(): Prefix(self.tree.root)}
        self.merged = 0
        self.lost = 0
        self.changed = 0
        self._fresh = 0

    # -- calls -------------------------------------------------------------------------------------

    def add(self, parent: Pages, count: int, users: int = 0) -> Pages:
        """Keep a prefix of so many more pages."""
        own = [self._fresh + i for i in range(count)]
        self._fresh += count
        pages, above = (*parent, *own), self.prefixes[parent].node
        node = self.tree.add(above, len(pages) * PAGE, own, self._fresh)
        node.users = users
        self.prefixes[pages] = Prefix(node, self._fresh, users)
        own.clear()  # the caller's list is its own
        return pages

    def give_up(self, pages: Pages) -> None:
        """Give a prefix's state up."""
        prefix = self.prefixes[pages]
        prefix.state = None
        before = self.burdens()
        self._compare(pages, before, self.tree.give_up(prefix.node))

    def visit(self, pages: Pages) -> None:
        """A request builds upon a prefix."""
        self.prefixes[pages].users += 1
        self.prefixes[pages].node.users += 1

    def leave(self, pages: Pages) -> None:
        """A request builds upon a prefix no more."""
        self.prefixes[pages].users -= 1
        self.prefixes[pages].node.users -= 1
        before = self.burdens()
        self._compare(pages, before, self.tree.tidy(self.prefixes[pages].node))

    def walk(self, pages: Pages, count: int) -> None:
        """A request keeps a prefix and builds upon that one from now on."""
        self.add(pages, count, users=1)
        self.leave(pages)

    def burdens(self) -> dict[Node, tuple[int, bool]]:
        """What depends on each node: its pages, and whether on its state alone."""
        return {node: (len(node.pages), node.is_leaf) for node in self.tree.nodes()}

    def _compare(self, pages: Pages, before: dict[Node, tuple[int, bool]], tidied: Tidied) -> None:
        """What went must be what nothing needs any more, in order; what changed must be told."""
        lost, changed = tidied
        after = self.burdens()
        assert {node for node in after if after[node] != before[node]} <= set(changed)
        self.changed += sum(after[node] != before[node] for node in after)
        prefix = self.prefixes[pages]
        if not prefix.needed:
            self.merged += any(other[: len(pages)] == pages for other in self.needed(pages))
            if pages:
                del self.prefixes[pages]
        still = {page for other in self.needed() for page in other}
        assert lost == [page for page in pages if page not in still]
        self.lost += len(lost)

    # -- what must hold ----------------------------------------------------------------------------

    def needed(self, but: Pages | None = None) -> list[Pages]:
        """Prefixes whose pages are."""
        return [pages for pages, prefix in self.prefixes.items() if prefix.needed and pages != but]

    def kept(self) -> list[Pages]:
        """Prefixes with states."""
        return [pages for pages, prefix in self.prefixes.items() if prefix.state is not None]

    def used(self) -> list[Pages]:
        """Prefixes that running requests build upon."""
        return [pages for pages, prefix in self.prefixes.items() if prefix.users]

    def above(self, pages: Pages) -> Pages:
        """The longest kept prefix of a prefix, or the empty one."""
        shorter = (other for other in self.kept() if len(other) < len(pages))
        return max((o for o in shorter if pages[: len(o)] == o), key=len, default=())

    def below(self, pages: Pages) -> list[Pages]:
        """Kept prefixes that begin with a prefix, without another one in between."""
        return [
            other
            for other in self.kept()
            if len(other) > len(pages)
            and other[: len(pages)] == pages
            and len(self.above(other)) <= len(pages)
        ]

    def check(self) -> None:
        """Compare the tree with the model."""
        assert self.tree.problems() == []
        nodes = list(self.tree.nodes())
        assert len(set(nodes)) == len(nodes)
        owned = [page for node in nodes for page in node.pages]
        assert sorted(owned) == sorted({page for pages in self.needed() for page in pages})
        states = {node.state: node for node in nodes if node.state is not None}
        assert len(states) == len(self.kept())
        for pages, prefix in self.prefixes.items():
            node = prefix.node
            assert (node.state, node.users) == (prefix.state, prefix.users)
            assert node.position == len(pages) * PAGE
            assert path(node) == list(pages)
            below = [self.prefixes[other].node for other in self.below(pages)]
            found = list(self.tree.descendants(node))
            assert len(found) == len(below)
            assert set(found) == set(below)
            others = [other for other in self.needed(pages) if other[: len(pages)] == pages]
            assert node.is_leaf == (not others and not prefix.users)
            if pages:
                assert node in set(nodes)
                assert self.tree.ancestor(node) is self.prefixes[self.above(pages)].node


def path(node: Node) -> list[int]:
    """The pages from the root to a node."""
    return (path(node.parent) if node.parent is not None else []) + node.pages


class TreeMachine(RuleBasedStateMachine):
    """Requests come, keep prefixes and go; states are given up in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.client = Client()

    def some(self, data: st.DataObject, prefixes: list[Pages]) -> Pages:
        """Draw one of them."""
        return prefixes[data.draw(st.integers(0, len(prefixes) - 1))]

    @rule(data=st.data(), count=st.integers(1, 4))
    def add(self, data: st.DataObject, count: int) -> None:
        self.client.add(self.some(data, list(self.client.prefixes)), count)

    @rule(data=st.data())
    def visit(self, data: st.DataObject) -> None:
        self.client.visit(self.some(data, list(self.client.prefixes)))

    @precondition(lambda self: self.client.used())
    @rule(data=st.data(), count=st.integers(1, 4))
    def walk(self, data: st.DataObject, count: int) -> None:
        self.client.walk(self.some(data, self.client.used()), count)

    @precondition(lambda self: self.client.used())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.client.leave(self.some(data, self.client.used()))

    @precondition(lambda self: self.client.kept())
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self.client.give_up(self.some(data, self.client.kept()))

    @invariant()
    def holds(self) -> None:
        self.client.check()

    def teardown(self) -> None:
        empty(self.client)


TestPrefixTree = TreeMachine.TestCase
TestPrefixTree.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, derandomize=True
)


def empty(client: Client) -> None:
    """Let everything go; every page that was kept must have been lost by then, once."""
    while client.used():
        client.leave(client.used()[-1])
    while client.kept():
        client.give_up(client.kept()[0])
    client.check()
    assert list(client.tree.nodes()) == []
    assert client.tree.root.children == {}
    assert client.lost == client._fresh


def churn(client: Client, rng: random.Random, steps: int) -> None:
    """Random calls that keep some dozen prefixes."""
    for _ in range(steps):
        kept, used = client.kept(), client.used()
        what = rng.random()
        if what < 0.3:
            client.add(rng.choice(list(client.prefixes)), rng.randint(1, 3))
        elif what < 0.5:
            client.visit(rng.choice(list(client.prefixes)))
        elif what < 0.6 and used:
            client.walk(rng.choice(used), rng.randint(1, 3))
        elif what < 0.75 and used:
            client.leave(rng.choice(used))
        elif kept:
            client.give_up(rng.choice(kept))
        if len(kept) > 20:
            client.give_up(rng.choice(client.kept()))
        client.check()
    empty(client)


@pytest.mark.parametrize("seed", range(3))
def test_pages_go_with_the_last_that_needs_them(seed: int) -> None:
    client = Client()
    churn(client, random.Random(seed), 600)
    assert client.lost > 300
    assert client.merged > 50
    assert client.changed > 50


def test_a_conversation_keeps_the_pages_of_its_system_prompt() -> None:
    tree = PrefixTree()
    system = tree.add(tree.root, 32, [1, 2], 100)
    first = tree.add(system, 64, [3, 4], 101)
    second = tree.add(system, 48, [5], 102)
    assert tree.give_up(system).lost == []
    assert (path(first), path(second)) == ([1, 2, 3, 4], [1, 2, 5])
    assert tree.ancestor(first) is tree.root
    lost, changed = tree.give_up(second)
    assert lost == [5]
    assert first in changed
    assert first.parent is tree.root
    assert first.pages == [1, 2, 3, 4]
    assert tree.give_up(first).lost == [1, 2, 3, 4]


def test_a_request_keeps_the_pages_of_a_state_that_was_given_up() -> None:
    tree = PrefixTree()
    node = tree.add(tree.root, 32, [1, 2], 100)
    node.users += 1
    assert not node.is_leaf
    assert tree.give_up(node).lost == []
    below = tree.add(node, 64, [3, 4], 101)
    node.users -= 1
    lost, changed = tree.tidy(node)
    assert lost == []
    assert below in changed
    assert below.pages == [1, 2, 3, 4]
    assert list(tree.nodes()) == [below]


def test_the_root_stays() -> None:
    tree = PrefixTree()
    assert tree.tidy(tree.root).lost == []
    with pytest.raises(AssertionError, match="the root has no ancestor"):
        tree.ancestor(tree.root)
    with pytest.raises(AssertionError):
        tree.add(tree.root, 0, [], 100)


def test_problems_are_named() -> None:
    tree = PrefixTree()
    node = tree.add(tree.root, 32, [1, 2], 100)
    below = tree.add(node, 64, [3, 4], 101)
    assert tree.problems() == []
    node.state = None
    assert tree.problems() == ["prefix of 32 tokens has no state and is needed by 1"]
    node.state, below.position = 100, 32
    assert tree.problems() == ["prefix of 32 tokens is not longer than its parent"]
    below.position, below.parent = 64, tree.root
    assert tree.problems() == ["prefix of 64 tokens is not among its parent's children"]


# -- controls --------------------------------------------------------------------------------------

TIDY = PrefixTree.tidy


def pages_not_merged(self: PrefixTree, node: Node) -> Tidied:
    """A node that goes does not leave its pages to the one below."""
    before = [(below, list(below.pages)) for below in node.children]
    tidied = TIDY(self, node)
    for below, pages in before:
        below.pages = pages
    return tidied


def pages_merged_behind(self: PrefixTree, node: Node) -> Tidied:
    """The pages of a node that goes are put behind those of the one below."""
    before = [(below, list(below.pages)) for below in node.children]
    tidied = TIDY(self, node)
    for below, pages in before:
        below.pages = pages + below.pages[: len(below.pages) - len(pages)]
    return tidied


def junction_left(self: PrefixTree, node: Node) -> Tidied:
    """A junction stays when one way of two goes, so that it leads to one place."""
    above = node.parent
    if above is None or node.state is not None or node.users or node.children:
        return TIDY(self, node)
    above.users += 1
    tidied = TIDY(self, node)
    above.users -= 1
    return tidied


def users_ignored(self: PrefixTree, node: Node) -> Tidied:
    """A node goes although requests build upon it."""
    users, node.users = node.users, 0
    tidied = TIDY(self, node)
    node.users = users
    return tidied


def changes_not_told(self: PrefixTree, node: Node) -> Tidied:
    """Whoever gets the pages of another is not told."""
    return Tidied(TIDY(self, node).lost, [node])


def ancestor_without_state(self: PrefixTree, node: Node) -> Node:
    """Junctions are taken for prefixes that one can resume from."""
    assert node.parent is not None
    return node.parent


@pytest.mark.parametrize(
    ("method", "mutant"),
    [
        ("tidy", pages_not_merged),
        ("tidy", pages_merged_behind),
        ("tidy", junction_left),
        ("tidy", users_ignored),
        ("tidy", changes_not_told),
        ("ancestor", ancestor_without_state),
        ("descendants", lambda self, node: iter(node.children)),
    ],
)
def test_control_a_spoilt_tree_is_noticed(
    monkeypatch: pytest.MonkeyPatch, method: str, mutant: Callable[..., object]
) -> None:
    monkeypatch.setattr(PrefixTree, method, mutant)
    with pytest.raises(AssertionError):
        churn(Client(), random.Random(1), 600)
