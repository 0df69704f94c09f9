"""What a GPU leaves for the cache."""

from __future__ import annotations

from dataclasses import dataclass

from avmp_vllm.models.shapes import ModelShape, ShapeError, dtype_bytes

GIB = 1 << 30

#: Memory of common cards as their vendor names it, in GiB. The driver keeps a little of it back,
#: which the reserve covers.
CARDS: dict[str, int] = {
    "rtx3060": 12,
    "rtx3090": 24,
    "rtx4060ti-16gb": 16,
    "rtx4080": 16,
    "rtx4090": 24,
    "rtx5090": 32,
    "t4": 16,
    "l4": 24,
    "a10": 24,
    "l40s": 48,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "h100": 80,
    "h200": 141,
}
#: Major number of their compute capability, by which vLLM chooses the attention backend.
GENERATIONS: dict[str, int] = {
    "rtx3060": 8,
    "rtx3090": 8,
    "rtx4060ti-16gb": 8,
    "rtx4080": 8,
    "rtx4090": 8,
    "rtx5090": 12,
    "t4": 7,
    "l4": 8,
    "a10": 8,
    "l40s": 8,
    "a100-40gb": 8,
    "a100-80gb": 8,
    "h100": 9,
    "h200": 9,
}
#: Share of the card that vLLM 0.32 uses by default (``--gpu-memory-utilization``).
UTILIZATION = 0.92
#: Bytes kept for activations, graphs and the runtime; a round figure, not a measurement.
RESERVE = GIB


@dataclass(frozen=True)
class Budget:
    """How a card's bytes are spent.

    Attributes:
        card: Name in ``CARDS``.
        total: Bytes of the card.
        weights: Bytes of the model's parameters.
        reserve: Bytes for everything else.
        how: How the weights were found.
    """

    card: str
    total: int
    weights: int
    reserve: int
    how: str

    @property
    def cache(self) -> int:
        """Bytes left for the cache; may be negative."""
        return int(self.total * UTILIZATION) - self.weights - self.reserve

    def describe(self) -> str:
        """One line that states every term."""
        return (
            f"{self.card}: {self.total / GIB:g} GiB x {UTILIZATION} - weights "
            f"{self.weights / GIB:.2f} GiB ({self.how}) - reserve {self.reserve / GIB:.2f} GiB "
            f"= {self.cache / GIB:.2f} GiB for the cache"
        )


def budget(
    card: str, shape: ModelShape, weight_dtype: str, parameters: float | None, reserve: int
) -> Budget:
    """Subtract a model from a card.

    Args:
        card: Name in ``CARDS``.
        shape: The model.
        weight_dtype: Of the parameters, or ``auto`` for the model's own.
        parameters: How many, or None for what the configuration's notes say.
        reserve: Bytes for everything else.

    Raises:
        ShapeError: Unknown card or number of parameters, or nothing is left.
    """
    if card not in CARDS:
        raise ShapeError(f"--gpu {card}: unknown card; known: {', '.join(CARDS)}, or use --memory")
    count = parameters or shape.parameters
    if not count:
        raise ShapeError(
            f"{shape.name} does not tell its number of parameters: give --parameters, such as 3e9"
        )
    dtype = shape.dtype if weight_dtype == "auto" else weight_dtype
    how = f"{count / 1e9:g} billion parameters in {dtype}"
    weights = int(count * dtype_bytes(dtype))
    found = Budget(card, CARDS[card] * GIB, weights, reserve, how)
    if found.cache <= 0:
        raise ShapeError(f"nothing is left for the cache: {found.describe()}")
    return found
