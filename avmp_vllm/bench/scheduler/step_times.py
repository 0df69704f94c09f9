"""How long a step takes: the stated clock, a card's roofline, or a file's measurements.

A step takes a fixed time, a time for each token and one for each sequence. By a card's data sheet

    fixed       bytes of all weights / memory bandwidth
    token       2 FLOPs for each parameter that a token passes / matrix rate
    sequence    its states read and written / memory bandwidth

added up, as if nothing overlapped. These are peaks: a real step takes longer. Attention and its KV
are left out, and so is everything that the host does. On a mixture of experts the fixed part reads
all experts, and a token passes those that are active.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from avmp_vllm.bench.inputs import InputError
from avmp_vllm.models.shapes import ModelShape, ShapeError, dtype_bytes


class Card(NamedTuple):
    """Two figures of a card's data sheet.

    Attributes:
        bandwidth: Of its memory, bytes a second.
        rate: FLOPs a second of 16-bit matrix products, dense, accumulated in 32 bits.
    """

    bandwidth: float
    rate: float


#: Names as ``avmp plan --gpu`` has them; the vendor's figures, boost clock.
CARDS: dict[str, Card] = {
    "rtx3060": Card(360e9, 25.5e12),
    "rtx3090": Card(936e9, 71e12),
    "rtx4090": Card(1008e9, 165e12),
    "rtx5090": Card(1792e9, 209e12),
    "t4": Card(320e9, 65e12),
    "l4": Card(300e9, 121e12),
    "a10": Card(600e9, 125e12),
    "l40s": Card(864e9, 362e12),
    "a100-40gb": Card(1555e9, 312e12),
    "a100-80gb": Card(2039e9, 312e12),
    "h100": Card(3350e9, 989e12),
    "h200": Card(4800e9, 989e12),
}
ALIASES = {"a100": "a100-80gb"}
#: The clock where no card is named; no card's.
DEFAULT = {"step_ms": 8.0, "token_us": 20.0, "sequence_us": 30.0}


class Clock(NamedTuple):
    """A step's times and where they come from.

    Attributes:
        times: ``step_ms``, ``token_us`` and ``sequence_us``.
        source: In words.
    """

    times: dict[str, float]
    source: str


def of_card(name: str, shape: ModelShape, active: float | None = None) -> Clock:
    """A card's roofline for a model.

    Args:
        name: Key of ``CARDS`` or ``ALIASES``.
        shape: The model.
        active: Parameters that a token passes; None for what the model's file says, else all.

    Raises:
        ShapeError: Unknown card, or the model's file does not tell its parameters.
    """
    known = ALIASES.get(name, name)
    if known not in CARDS:
        raise ShapeError(f"--card {name}: unknown; known: {', '.join([*CARDS, *ALIASES])}")
    if not shape.parameters:
        raise ShapeError(f"--card {name}: {shape.name} does not tell its number of parameters")
    card = CARDS[known]
    passed = active or shape.active_parameters or shape.parameters
    weights = shape.parameters * dtype_bytes(shape.dtype)
    states = 2 * shape.state_bytes * shape.ssm_layers
    times = {
        "step_ms": weights / card.bandwidth * 1e3,
        "token_us": 2 * passed / card.rate * 1e6,
        "sequence_us": states / card.bandwidth * 1e6,
    }
    times = {key: float(f"{value:.4g}") for key, value in times.items()}
    source = (
        f"{known} by roofline: {weights / 1e9:.3g} GB of weights and {states / 1e6:.3g} MB of "
        f"states read and written a sequence at {card.bandwidth / 1e9:g} GB/s, 2 x "
        f"{passed / 1e9:.3g} billion FLOPs a token at {card.rate / 1e12:g} TFLOP/s; peaks, added "
        "up, without attention"
    )
    return Clock(times, source)


def of_file(path: Path) -> dict[str, float]:
    """Measured times: a JSON object with any of ``step_ms``, ``token_us`` and ``sequence_us``.

    Raises:
        InputError: It cannot be read, or holds anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, None, f"cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(path, error.lineno, f"is not JSON: {error.msg}") from error
    if not isinstance(values, dict) or not values or values.keys() - DEFAULT.keys():
        raise InputError(path, None, f"must be an object with any of {', '.join(DEFAULT)}")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise InputError(path, None, f"{name} = {value!r} must be a number of at least 0")
    return {name: float(value) for name, value in values.items()}


def clock(
    shape: ModelShape,
    card: str | None,
    file: Path | None,
    given: dict[str, float | None],
    active: float | None = None,
) -> Clock:
    """The clock of a run: what was given on the command line, else the file, the card, the default.

    Args:
        shape: The model.
        card: Name of a card, if any.
        file: With measured times, if any.
        given: Times that were given on the command line, None for those that were not.
        active: Parameters that a token passes, if given.
    """
    found = of_card(card, shape, active) if card else Clock(DEFAULT, "the default clock, no card's")
    times, sources = dict(found.times), [found.source]
    if file is not None:
        measured = of_file(file)
        times |= measured
        sources.append(f"{', '.join(measured)} from {file.name}")
    if told := {name: value for name, value in given.items() if value is not None}:
        times |= told
        sources.append(f"{', '.join(told)} as given")
    return Clock(times, "; ".join(sources))
