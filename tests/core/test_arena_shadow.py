"""Every page's bytes are tagged, every relocation is applied to them, and every page is read back.

The worker's page table sees relocations and nothing else. Controls at the end spoil the plan on its
way to the worker in the ways a worker could; each must be noticed.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from arena_client import Client, Damage, ShadowMemory, assert_everything_happened

from avmp_vllm.core import Geometry, Kind, Relocation

#: Page bytes, block bytes, arena bytes: pages smaller and larger than blocks, and odd ones.
SHAPES = [(64, 456, 16_000), (512, 96, 20_000), (128, 128, 9_000), (33, 700, 15_011)]


def churn(client: Client, rng: random.Random, steps: int, calls: int = 12) -> None:
    """Run requests that come, grow, share, finish and come back, ``calls`` of them in a step."""
    model = client.model
    requests: list[list[int]] = []
    for _ in range(steps):
        # The mix drifts between many short requests and few long ones, so the bands move.
        longest = rng.choice([1, 4, 30, 100])
        for _ in range(rng.randint(1, calls)):
            what = rng.random()
            if what < 0.45:
                handles = client.allocate(rng.randint(0, longest), rng.randint(0, 2))
                if handles:
                    requests.append(handles)
            elif what < 0.55 and requests:
                handles = client.allocate(rng.randint(1, 4), 0)
                if handles:
                    rng.choice(requests).extend(handles)
            elif what < 0.60 and requests:
                shared = [h for h in rng.choice(requests) if rng.random() < 0.5]
                for handle in shared:
                    client.share(handle)
                requests.append(shared)
            elif what < 0.67 and model.cached:
                revived = rng.sample(list(model.cached), rng.randint(1, min(5, len(model.cached))))
                for handle in revived:
                    client.revive(handle)
                requests.append(revived)
            elif what < 0.70 and model.cached:
                client.drop(rng.choice(list(model.cached)))
            elif requests:
                handles = requests.pop(rng.randrange(len(requests)))
                rng.shuffle(handles)
                client.release(handles, keep=rng.random() < 0.5)
        client.step()
        client.check()


@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize(("page", "block", "size"), SHAPES)
def test_no_byte_is_lost(page: int, block: int, size: int, batch: int) -> None:
    geometry = Geometry(size, page, block)
    client = Client(geometry, batch, ShadowMemory(geometry))
    churn(client, random.Random(f"{page} {block} {batch}"), steps=150)
    assert_everything_happened(client.arena)


def chained(moves: list[Relocation]) -> bool:
    """Whether a move leaves a place that an earlier one in the same plan filled, or fills one
    that an earlier one left."""
    seen: set[tuple[Kind, int]] = set()
    for move in moves:
        places = {(move.kind, move.source), (move.kind, move.target)}
        if seen & places:
            return True
        seen |= places
    return False


def crossing(geometry: Geometry, moves: list[Relocation]) -> bool:
    """Whether a page moves onto bytes that a page of the other kind leaves in the same plan."""
    left: list[tuple[Kind, int, int]] = []
    for move in moves:
        unit = geometry.unit(move.kind)
        low, high = move.target * unit, (move.target + 1) * unit
        if any(kind is not move.kind and a < high and low < b for kind, a, b in left):
            return True
        left.append((move.kind, move.source * unit, (move.source + 1) * unit))
    return False


def there_and_back(client: Client) -> None:
    """Within one step blocks make way for pages, and some of those pages for blocks again."""
    blocks = client.allocate(0, 19)
    assert blocks
    client.step()
    client.release(blocks[:8], keep=False)
    pages = client.allocate(80, 0)
    assert pages
    client.release(pages[:40], keep=False)
    assert client.allocate(0, 4)
    client.step()


def test_plans_hold_moves_that_depend_on_each_other() -> None:
    """The controls below have something to spoil: places are left and taken within one step."""
    geometry = Geometry(16_000, 64, 456)
    client = Client(geometry, 1, ShadowMemory(geometry))
    churn(client, random.Random(5), steps=100, calls=40)
    assert any(chained(moves) for moves in client.steps)
    geometry = Geometry(20_000, 100, 1_000)
    client = Client(geometry, 1, ShadowMemory(geometry))
    there_and_back(client)
    assert crossing(geometry, client.steps[-1])


def last_first(moves: list[Relocation]) -> list[Relocation]:
    """The worker applies a plan backwards."""
    return moves[::-1]


def by_pool(moves: list[Relocation]) -> list[Relocation]:
    """The worker applies one pool's relocations, then the other's."""
    return sorted(moves, key=lambda move: move.kind)


def without_last(moves: list[Relocation]) -> list[Relocation]:
    """One relocation is lost."""
    return moves[:-1]


@pytest.mark.parametrize("deliver", [last_first, without_last])
def test_a_spoilt_plan_is_noticed(
    deliver: Callable[[list[Relocation]], list[Relocation]],
) -> None:
    geometry = Geometry(16_000, 64, 456)
    client = Client(geometry, 1, ShadowMemory(geometry), deliver)
    with pytest.raises((Damage, AssertionError), match=r"lost the bytes|null bytes|leaves"):
        churn(client, random.Random(5), steps=300, calls=40)


def test_one_pool_after_the_other_is_noticed() -> None:
    geometry = Geometry(20_000, 100, 1_000)
    client = Client(geometry, 1, ShadowMemory(geometry), by_pool)
    with pytest.raises(Damage):
        there_and_back(client)


def test_zeroing_before_relocation_is_noticed() -> None:
    """A new page may lie where a live one still is until the plan has moved it."""
    geometry = Geometry(16_000, 64, 456)
    client = Client(geometry, 1, ShadowMemory(geometry))
    client.zero_first = True
    with pytest.raises(Damage):
        churn(client, random.Random(5), steps=300, calls=40)


def test_a_copy_without_the_table_entry_is_noticed() -> None:
    """Bytes move, the worker's page table does not hear of it."""
    geometry = Geometry(16_000, 64, 456)
    memory = ShadowMemory(geometry)
    client = Client(geometry, 1, memory)
    memory.relocate = lambda moves: [  # type: ignore[method-assign]
        memory.bytes.__setitem__(
            memory.span(move.kind, move.target), memory.bytes[memory.span(move.kind, move.source)]
        )
        for move in moves
    ]
    with pytest.raises(Damage):
        churn(client, random.Random(5), steps=300, calls=40)
