"""``avmp plan``: what fits into given bytes, or onto a given card, before anything is bought."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from avmp_vllm.core import ArenaTooSmall, Geometry, Kind
from avmp_vllm.core.capacity import Layers, StaticSplit, StockPlan, binding_pool
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.models.shapes import ModelShape, ShapeError, read_shape
from avmp_vllm.planner.cards import CARDS, RESERVE, budget

#: SGLang's default split, bytes of states to bytes of KV.
STATIC_RATIO = 0.9
#: Stock vLLM 0.32 rounds the block of a hybrid model with a latent cache to this (CUDA's MLA
#: kernels want it; Platform._align_hybrid_block_size).
LATENT_UNIT = 128

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|[kmgt]i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int:
    """Read ``5GiB``, ``64MiB``, ``10GB`` or plain bytes; a decimal prefix counts in thousands."""
    match = _SIZE.fullmatch(text.strip())
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GiB, 512MiB or bytes")
    prefix = match[2].lower()
    base = 1024 if prefix.endswith("i") else 1000
    return int(float(match[1]) * base ** _POWERS[prefix[:1]])


def parse_lengths(text: str) -> list[int]:
    """Read ``64,256,1k,4k``; k is 1,024."""
    lengths = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)(k?)", word.strip().lower())
        if not match or not int(match[1]):
            raise argparse.ArgumentTypeError(f"{word!r} is no length; write 64,256,1k,32k")
        lengths.append(int(match[1]) * (1024 if match[2] else 1))
    return lengths


@dataclass(frozen=True)
class Plan:
    """Everything that a plan prints.

    Attributes:
        layers: The model's, per rank.
        geometry: Of AVMP's arena.
        stock: Stock vLLM on the same bytes.
        static: Two pools with a fixed split on the same bytes.
        states: States that a sequence holds: one, or two with prefix caching, as vLLM reckons.
        max_model_len: Longest sequence, for vLLM's own figure.
    """

    layers: Layers
    geometry: Geometry
    stock: StockPlan
    static: StaticSplit
    states: int
    max_model_len: int

    def limit(self, tokens: int) -> int:
        """Sequences that fit if bytes were shared without any granularity."""
        return self.geometry.arena_bytes // self.layers.sequence_bytes(tokens, self.states)

    def sequences(self, tokens: int) -> dict[str, int]:
        """Sequences of so many tokens that fit, by variant."""
        return {
            "stock": self.stock.sequences(tokens),
            "static": self.static.sequences(tokens, self.states),
            "AVMP": self.geometry.sequences(tokens, self.states),
            "limit": self.limit(tokens),
        }

    @property
    def stock_padding(self) -> float:
        """Bytes of padding to each byte of state under stock."""
        page = self.stock.block_tokens * self.layers.token_bytes
        return page / self.layers.state_bytes - 1


def make_plan(
    shape: ModelShape,
    arena_bytes: int,
    *,
    kv_dtype: str = "auto",
    page_tokens: int = 16,
    stock_unit: int | None = None,
    prefix_caching: bool = True,
    static_ratio: float = STATIC_RATIO,
    max_model_len: int | None = None,
) -> Plan:
    """Plan a model.

    Args:
        shape: The model.
        arena_bytes: Bytes for the cache.
        kv_dtype: Of the attention cache; ``auto`` is the model's.
        page_tokens: Tokens of AVMP's page.
        stock_unit: Tokens that stock's block is a multiple of: 16 on CUDA, or 128 with a latent
            cache; 128 on CPU.
        prefix_caching: Whether a sequence holds two states.
        static_ratio: State bytes to KV bytes of the static split.
        max_model_len: Longest sequence; the model's own by default.

    Raises:
        ArenaTooSmall: Not even one page of each kind fits.
    """
    layers = Layers(
        shape.kv_layers, shape.token_bytes(kv_dtype), shape.ssm_layers, shape.state_bytes
    )
    geometry = layers.geometry(arena_bytes, page_tokens)
    states = 2 if prefix_caching else 1
    unit = stock_unit or (LATENT_UNIT if shape.latent else 16)
    return Plan(
        layers,
        geometry,
        layers.stock(arena_bytes, unit, states),
        StaticSplit(geometry, static_ratio),
        states,
        max_model_len or shape.max_model_len,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="config.json, model folder, or hub name")
    parser.add_argument("--memory", type=parse_bytes, help="bytes for the cache, such as 5GiB")
    parser.add_argument("--gpu", help=f"instead of --memory: {', '.join(CARDS)}")
    parser.add_argument("--lengths", type=parse_lengths, default=parse_lengths("64,256,1k,4k,32k"))
    parser.add_argument("--kv-dtype", default="auto", help="of the attention cache, such as fp8")
    parser.add_argument("--state-dtype", default="auto", help="of the SSM state, such as float32")
    parser.add_argument("--page-tokens", type=int, default=16, help="32 on vLLM's CPU backend")
    parser.add_argument(
        "--stock-unit",
        type=int,
        help="stock's block is a multiple of this: 16, with a latent cache 128 (CUDA), 128 (CPU)",
    )
    parser.add_argument("--max-model-len", type=int, help="for vLLM's own capacity figure")
    parser.add_argument(
        "--no-prefix-caching", action="store_true", help="one state a sequence, not two"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="result file, for `avmp plot`")
    parser.add_argument("--parameters", type=float, help="with --gpu: parameters, such as 3e9")
    parser.add_argument("--weight-dtype", default="auto", help="with --gpu: such as fp8")
    parser.add_argument("--reserve", type=parse_bytes, default=RESERVE, help="with --gpu (1GiB)")


def _print_sizes(console: Console, shape: ModelShape, plan: Plan, caching: bool) -> None:
    geometry, layers, stock = plan.geometry, plan.layers, plan.stock
    console.print(
        f"{shape.name} ({shape.model_type}): {layers.kv_layers} attention layers of "
        f"{layers.token_bytes:,} bytes a token, {layers.ssm_layers} SSM layers of "
        f"{layers.state_bytes:,} bytes a state"
    )
    for note in (f"source: {shape.source}" if shape.source else "", *shape.assumed):
        if note:
            console.print(f"  {'' if note.startswith('source') else 'assumed: '}{note}")
    table = Table(title=f"{geometry.arena_bytes:,} bytes for the cache")
    for column in ("", "stock vLLM", f"static {plan.static.ratio:g}", "AVMP"):
        table.add_column(column, justify="left" if not column else "right")
    exact = f"{geometry.page_bytes:,}"
    size = stock.block_tokens * layers.token_bytes
    per_group = ceil_div(layers.kv_layers, len(stock.groups))
    table.add_row(
        "tokens of a KV block", f"{stock.block_tokens:,}", *[str(geometry.page_tokens)] * 2
    )
    table.add_row("bytes of a KV page", f"{size * per_group:,} (one group)", exact, exact)
    state = f"{geometry.block_bytes:,}"
    padded = f"{size * layers.ssm_layers:,} (+{plan.stock_padding:.1%})"
    table.add_row("bytes of one state, all layers", padded, state, state)
    table.add_row("block tables", str(stock.tables), "2", "2")
    table.add_row("blocks", f"{stock.blocks:,}", "", "")
    table.add_row("KV pages at most", "", f"{plan.static.pages:,}", f"{geometry.page_limit:,}")
    table.add_row("SSM blocks at most", "", f"{plan.static.blocks:,}", f"{geometry.block_limit:,}")
    hits = (
        (f"{stock.block_tokens:,}", f"{geometry.page_tokens}", f"{geometry.page_tokens}")
        if caching
        else ("off",) * 3
    )
    table.add_row("prefix hits land on (tokens)", *hits)
    if caching:
        kept = (f"every {stock.block_tokens:,} tokens", *["by its worth"] * 2)
        table.add_row("a state is kept", *kept)
    console.print(table)


def _print_capacity(console: Console, plan: Plan, lengths: list[int]) -> None:
    table = Table(title=f"what fits ({plan.states} state(s) a sequence): sequences / tokens")
    table.add_column("tokens each", justify="right")
    for column in ("stock vLLM", f"static {plan.static.ratio:g}", "AVMP", "limit"):
        table.add_column(column, justify="right")
    table.add_column("static: dry first")
    table.add_column("AVMP: larger part")
    table.add_column("most")
    for tokens in lengths:
        fit = plan.sequences(tokens)
        best = max(fit["stock"], fit["static"], fit["AVMP"])
        table.add_row(
            f"{tokens:,}",
            *(f"{count:,} / {count * tokens:,}" for count in fit.values()),
            plan.static.binding(tokens, plan.states).name,
            binding_pool(plan.geometry, tokens, plan.states).name,
            ", ".join(name for name, count in list(fit.items())[:3] if count == best),
        )
    console.print(table)


def _write(path: Path, shape: ModelShape, plan: Plan, lengths: list[int]) -> None:
    """Write what fits as a result file."""
    from avmp_vllm.bench import results

    content = {
        "format": results.FORMAT,
        "benchmark": "plan",
        "environment": results.environment(None, ()),
        "parameters": {
            "model": shape.name,
            "arena_bytes": plan.geometry.arena_bytes,
            "states": plan.states,
            "static_ratio": plan.static.ratio,
        },
        "counts": {
            "tokens": lengths,
            "sequences": [plan.sequences(tokens) for tokens in lengths],
            "page_tokens": plan.geometry.page_tokens,
            "stock_block_tokens": plan.stock.block_tokens,
        },
        "timings": {},
    }
    results.write(path, content)
    print(f"Written: {path}")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    try:
        shape = read_shape(args.model).with_state_dtype(args.state_dtype)
        console = Console(
            soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160
        )
        if (args.memory is None) == (args.gpu is None):
            raise ShapeError("give either --memory or --gpu")
        memory = args.memory
        if args.gpu:
            spent = budget(args.gpu, shape, args.weight_dtype, args.parameters, args.reserve)
            console.print(spent.describe())
            memory = spent.cache
        plan = make_plan(
            shape,
            memory,
            kv_dtype=args.kv_dtype,
            page_tokens=args.page_tokens,
            stock_unit=args.stock_unit,
            prefix_caching=not args.no_prefix_caching,
            max_model_len=args.max_model_len,
        )
    except (ShapeError, ArenaTooSmall) as error:
        print(f"avmp plan: error: {error}", file=sys.stderr)
        return 2
    _print_sizes(console, shape, plan, not args.no_prefix_caching)
    _print_capacity(console, plan, args.lengths)
    if not args.no_prefix_caching:
        warm = ", ".join(
            f"{plan.geometry.sequences(tokens):,} of {tokens:,}" for tokens in args.lengths
        )
        console.print(
            f"AVMP keeps warm, while nothing runs, conversations of so many tokens: {warm} "
            "(each a state and its pages)"
        )
    logged = plan.stock.logged_tokens(plan.max_model_len)
    console.print(
        f"stock vLLM would log: KV cache size: {logged:,} tokens "
        f"(for {plan.max_model_len:,} tokens a request)"
    )
    usable = plan.geometry.page_limit * plan.geometry.page_tokens
    console.print(
        f"AVMP at most: {usable:,} tokens if no state is live; no split is fixed, "
        f"{Kind.KV.name} and {Kind.SSM.name} share every byte"
    )
    console.print(
        "static: AVMP's exact pages under SGLang's default split (state : KV bytes); "
        "SGLang's own page sizes and prefix granularity may differ"
    )
    if shape.latent:
        console.print(
            "AVMP's engine does not serve latent (MLA) caches yet; the plan is arithmetic"
        )
    if args.output:
        _write(args.output, shape, plan, args.lengths)
    return 0
