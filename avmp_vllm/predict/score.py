"""How good the forecasts are that a running engine makes, beside one that knows nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

#: Shares of answers that are to stay within what is forecast of them.
SHARES = (0.5, 0.9)


@dataclass
class Score:
    """Sums over answers that ended by themselves.

    Attributes:
        answers: How many.
        within: Answers that stayed within the forecast of each of ``SHARES``.
        loss: Log-loss of the octaves that they ended in, nats.
        general_loss: The same of a model that tells no request from another.
    """

    answers: int = 0
    within: list[int] = field(default_factory=lambda: [0] * len(SHARES))
    loss: float = 0.0
    general_loss: float = 0.0
