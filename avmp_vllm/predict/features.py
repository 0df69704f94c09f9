"""What may tell something about an answer's length before it begins, as keys of rows.

Each feature is a *ladder* of grains, coarse to fine; a finer row stands on the coarser one above
it. Lengths are told apart on a logarithmic scale, ``grain`` classes from a length to its double.
"""

from __future__ import annotations

import math
from typing import NamedTuple

#: Classes an octave of prompt lengths, and of the previous answer's length.
PROMPT_GRAINS = (2, 8, 32)
PREVIOUS_GRAINS = (1, 2, 4)
#: Turns from here on are one class.
TURN_GRAINS = (1, 3, 8)
LADDERS = 3
DEPTH = 3
#: The number of a level stands above the bits of a class.
_LEVEL = 1 << 16


class Known(NamedTuple):
    """What is known of a request when it arrives.

    Attributes:
        prompt_tokens: Length of its prompt.
        turn: Answers that its conversation has had.
        previous: Tokens of the last of them, or None where there is none.
    """

    prompt_tokens: int
    turn: int = 0
    previous: int | None = None


def keys(known: Known) -> list[int]:
    """Keys of a request's rows: the coarse grain of each ladder, then the middle, then the fine.

    Classes of all levels are below 2**16, so no two levels share a key. Key 0 and those right
    above it, level 0, are left to rows that every request belongs to.
    """
    prompt = math.log2(known.prompt_tokens + 1)
    # 0 is the class of conversations that begin here.
    before = -1.0 if known.previous is None else math.log2(known.previous + 1)
    found = []
    level = 0
    for depth in range(DEPTH):
        grain = PREVIOUS_GRAINS[depth]
        previous = 0 if before < 0 else 1 + int(before * grain)
        classes = (
            int(prompt * PROMPT_GRAINS[depth]),
            previous,
            min(known.turn, TURN_GRAINS[depth]),
        )
        for each in classes:
            level += 1
            found.append(level * _LEVEL + each)
    return found
