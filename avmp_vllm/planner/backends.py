"""The tokens of a page: what the attention backend that a card gets asks for.

vLLM chooses a backend by the card and the model (``platforms/cuda.py``), and each takes blocks of
some sizes only. Both are written down here for the cards that the planner knows; a test compares
the sizes with vLLM's own classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from avmp_vllm.core.caches import Layers
from avmp_vllm.core.stock import StockRules
from avmp_vllm.core.tables import Role
from avmp_vllm.models.shapes import ModelShape, ShapeError

#: The smallest page, and stock's block where no backend asks for more.
LEAST_TOKENS = 16
#: Stock's block of a hybrid model with a latent cache is a multiple of this
#: (``Platform._align_hybrid_block_size``), and so is every block of the CPU platform.
STOCK_TOKENS = 128


@dataclass(frozen=True)
class Backend:
    """An attention backend of vLLM.

    Attributes:
        name: As vLLM's ``AttentionBackendEnum`` has it.
        tokens: Of its smallest block.
        rows: Blocks must start at whole rows of its cache (sparse MLA kernels read rows).
        cpu: Of the CPU platform.
    """

    name: str
    tokens: int
    rows: bool = False
    cpu: bool = False


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("FLASH_ATTN", 16),
        Backend("FLASHINFER", 16),
        Backend("TRITON_ATTN", 16),
        Backend("CPU_ATTN", 32, cpu=True),
    )
}
LATENT_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("FLASH_ATTN_MLA", 16),
        Backend("FLASHMLA", 64),
        Backend("FLASHINFER_MLA", 32),
        Backend("CUTLASS_MLA", 128),
        Backend("TRITON_MLA", 16),
        Backend("CPU_MLA", 16, cpu=True),
    )
}
SPARSE_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("FLASHMLA_SPARSE", 64),
        Backend("FLASH_ATTN_MLA_SPARSE", 64, rows=True),
        Backend("FLASHINFER_MLA_SPARSE", 32),
        Backend("FLASHINFER_MLA_SPARSE_SM90", 64, rows=True),
    )
}
#: Entries of an indexer's block of compressed keys at least (``get_paged_mqa_page_sizes``).
INDEXER_ENTRIES = {12: 64}
#: Without a card: the generation that most servers have.
GENERATION = 9
#: What vLLM tries first, by the major number of the card's compute capability.
_FIRST = {10: "FLASHINFER"}
_FIRST_LATENT = {9: "FLASH_ATTN_MLA", 10: "FLASHINFER_MLA"}
_FIRST_SPARSE = {9: "FLASHINFER_MLA_SPARSE_SM90", 10: "FLASHMLA_SPARSE"}


@dataclass(frozen=True)
class Assumed:
    """A backend, what follows from it, and why it was assumed.

    Attributes:
        backend: Of the attention layers.
        page_tokens: Of AVMP's page.
        stock: What it asks of stock vLLM's block.
        alignment: What the bytes of AVMP's page must be a multiple of.
        why: For people.
    """

    backend: Backend
    page_tokens: int
    stock: StockRules
    alignment: int
    why: str


def assume(
    shape: ModelShape, layers: Layers, name: str | None = None, generation: int | None = None
) -> Assumed:
    """Find the backend of a model, and the tokens of its pages.

    Args:
        shape: The model.
        layers: Its caches in bytes.
        name: Of the backend, or None for what the card gets.
        generation: Major number of the card's compute capability.

    Raises:
        ShapeError: A backend that the model does not use.
    """
    major = generation or GENERATION
    sparse = shape.latent and any(layer.entry_tokens > 1 for layer in shape.layers)
    if sparse:
        known, first = SPARSE_BACKENDS, _FIRST_SPARSE.get(major, "FLASHMLA_SPARSE")
    elif shape.latent:
        known, first = LATENT_BACKENDS, _FIRST_LATENT.get(major, "TRITON_MLA")
    else:
        known, first = BACKENDS, _FIRST.get(major, "FLASH_ATTN")
    if name is not None and name not in known:
        raise ShapeError(
            f"--backend {name}: {shape.name} is not served by it; known: {', '.join(known)}"
        )
    backend = known[name or first]
    least = lcm(backend.tokens, layers.whole_tokens())
    if sparse:
        least = lcm(least, *_indexer_tokens(layers, INDEXER_ENTRIES.get(major, 32)))
    unit = STOCK_TOKENS if shape.latent or backend.cpu else max(backend.tokens, LEAST_TOKENS)
    alignment = layers.attention.entry_bytes if backend.rows else 1
    given = "given" if name else f"assumed for compute capability {major}.x"
    return Assumed(
        backend, max(least, LEAST_TOKENS), StockRules(unit, least, alignment), alignment, given
    )


def _indexer_tokens(layers: Layers, entries: int) -> list[int]:
    """Tokens of an indexer's smallest blocks."""
    compressed = (cache for cache in layers.of(Role.SLOTS) if cache.entry_tokens > 1)
    return [cache.entry_tokens * entries for cache in compressed]
