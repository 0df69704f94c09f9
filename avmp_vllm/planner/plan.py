"""What fits: one model, so many bytes, and everything that ``avmp plan`` prints."""

from __future__ import annotations

from dataclasses import dataclass

from avmp_vllm.core import Geometry
from avmp_vllm.core.caches import Layers, Load
from avmp_vllm.core.capacity import StaticSplit, StockPlan
from avmp_vllm.core.stock import StockRules, plan_stock
from avmp_vllm.core.tables import Table
from avmp_vllm.models.drafts import Drafts
from avmp_vllm.models.shapes import ModelShape, ShapeError
from avmp_vllm.planner.backends import Assumed, assume

#: SGLang's default split, bytes of states to bytes of KV.
STATIC_RATIO = 0.9
#: Tokens that may be scheduled but not yet settled: two steps of vLLM's default batch.
STEP_TOKENS = 2 * 8192


@dataclass(frozen=True)
class Plan:
    """Everything that a plan prints.

    Attributes:
        shape: The model, with what its drafter keeps.
        layers: Its caches in bytes, per rank.
        tables: Block tables of AVMP's KV pages.
        geometry: Of AVMP's arena.
        assumed: The attention backend, and the tokens of its pages.
        stock: Stock vLLM on the same bytes; None if it cannot plan the layers.
        static: Two pools with a fixed split on the same bytes.
        states: States that a sequence holds: one, or two with prefix caching, and one for each
            token that is drafted for it, as vLLM reckons.
        max_model_len: Longest sequence, for vLLM's own figure.
        drafts: Speculative decoding.
    """

    shape: ModelShape
    layers: Layers
    tables: tuple[Table, ...]
    geometry: Geometry
    assumed: Assumed
    stock: StockPlan | None
    static: StaticSplit
    states: int
    max_model_len: int
    drafts: Drafts | None = None

    def limit(self, tokens: int) -> int:
        """Sequences that fit if bytes were shared without any granularity."""
        return self.geometry.arena_bytes // self.layers.sequence_bytes(tokens, self.states)

    def sequences(self, tokens: int) -> dict[str, int | None]:
        """Sequences of so many tokens that fit, by variant; None where one cannot plan them."""
        return {
            "stock": self.stock and self.stock.sequences(tokens),
            "static": self.static.sequences(tokens, self.states),
            "AVMP": self.geometry.sequences(tokens, self.states),
            "limit": self.limit(tokens),
        }

    @property
    def stock_state_bytes(self) -> int | None:
        """Bytes of one state of all layers under stock, padding included."""
        if self.stock is None:
            return None
        page = self.layers.attention.page_bytes(self.stock.block_tokens)
        return page * sum(cache.layers for cache in self.layers.states)

    @property
    def stock_padding(self) -> float | None:
        """Bytes of padding to each byte of state under stock."""
        padded = self.stock_state_bytes
        return None if padded is None else padded / self.layers.state_bytes - 1


def make_plan(
    shape: ModelShape,
    arena_bytes: int,
    *,
    kv_dtype: str = "auto",
    page_tokens: int | None = None,
    stock_unit: int | None = None,
    prefix_caching: bool = True,
    static_ratio: float = STATIC_RATIO,
    max_model_len: int | None = None,
    step_tokens: int = STEP_TOKENS,
    backend: str | None = None,
    generation: int | None = None,
    drafts: Drafts | None = None,
) -> Plan:
    """Plan a model.

    Args:
        shape: The model.
        arena_bytes: Bytes for the cache.
        kv_dtype: Of the attention cache; ``auto`` is the model's.
        page_tokens: Tokens of AVMP's page; the backend's smallest by default.
        stock_unit: Tokens that stock's block is chosen in multiples of; the backend's by default.
        prefix_caching: Whether a sequence holds two states beside those of its drafts.
        static_ratio: State bytes to KV bytes of the static split.
        max_model_len: Longest sequence; the model's own by default.
        step_tokens: Tokens that may be in flight, which bound the pages of a window.
        backend: Name of the attention backend; what the card gets by default.
        generation: Major number of the card's compute capability.
        drafts: Speculative decoding.

    Raises:
        ArenaTooSmall: Not even one page of each kind fits.
        ShapeError: A page, a backend or a drafter that the model cannot have.
    """
    states = 2 if prefix_caching else 1
    if drafts is not None:
        shape = drafts.beside(shape)
        states += drafts.tokens
    layers = shape.caches(kv_dtype)
    assumed = assume(shape, layers, backend, generation)
    page = page_tokens or assumed.page_tokens
    whole = layers.whole_tokens()
    if page < 1 or page % whole:
        raise ShapeError(
            f"--page-tokens {page}: {shape.name} needs pages of a multiple of {whole} tokens"
        )
    load = Load(step_tokens, max_model_len or shape.max_model_len)
    geometry = layers.geometry(arena_bytes, page, load, assumed.alignment)
    rules = assumed.stock
    if stock_unit:
        rules = StockRules(stock_unit, whole, rules.alignment)
    return Plan(
        shape,
        layers,
        tuple(layers.tables(page, load)),
        geometry,
        assumed,
        plan_stock(layers, arena_bytes, rules, states, load),
        StaticSplit(geometry, static_ratio),
        states,
        load.max_model_len,
        drafts,
    )
