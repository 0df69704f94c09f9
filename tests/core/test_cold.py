"""Halves of blocks against a set."""

from __future__ import annotations

import random

import pytest

from avmp_vllm.core import SSM_TAG
from avmp_vllm.core.cold import ColdBlocks, half_of, slot_of


@pytest.mark.parametrize("block", [0, 1, SSM_TAG | 1, SSM_TAG | 12345])
@pytest.mark.parametrize("half", [0, 1])
def test_a_slot_is_no_handle(block: int, half: int) -> None:
    assert slot_of(block, half) < 0
    assert half_of(slot_of(block, half)) == (block, half)


@pytest.mark.parametrize("seed", range(20))
def test_no_two_states_share_a_half(seed: int) -> None:
    rng, blocks, held = random.Random(seed), ColdBlocks(), set()
    free = iter(range(10_000))
    for _ in range(600):
        if rng.random() < 0.55:
            half_empty = {half_of(s)[0] for s in held if slot_of(*_other(s)) not in held}
            slot = blocks.place()
            assert (slot is None) == (not half_empty)
            if slot is None:
                slot = blocks.begin(next(free))
            assert slot not in held
            assert held == set() or half_of(slot)[0] in half_empty or not half_empty
            held.add(slot)
        elif held:
            slot = rng.choice(sorted(held))
            held.remove(slot)
            alone = slot_of(*_other(slot)) not in held
            assert blocks.vacate(slot) == (half_of(slot)[0] if alone else None)
        assert len(blocks) == len(held)
        assert set(blocks) == {half_of(slot)[0] for slot in held}
        assert all(half_of(slot)[0] in blocks for slot in held)
    blocks.clear()
    assert (len(blocks), list(blocks), blocks.place()) == (0, [], None)


def _other(slot: int) -> tuple[int, int]:
    block, half = half_of(slot)
    return block, 1 - half
