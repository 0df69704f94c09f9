"""Bytes as a user writes them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgtKMGT])|([kmgt])(i?)b)?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def read_bytes(value: object) -> int:
    """Read bytes: a number, ``2G`` and ``2g`` as vLLM's own options have them, ``2GiB``, ``2GB``.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("write bytes, 512MiB, 2GiB, 2GB, or 2G as for --kv-cache-memory-bytes")
    number, letter, unit, binary = match.groups()
    if letter:  # vLLM's: a capital letter counts in 1,024s
        base = 1024 if letter.isupper() else 1000
    else:
        base = 1024 if binary else 1000
    power = _POWERS[(letter or unit).lower()] if letter or unit else 0
    return int(float(number) * base**power)
