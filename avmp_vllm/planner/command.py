"""``avmp plan``: what fits into given bytes, or onto a given card, before anything is bought."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from avmp_vllm.core import ArenaTooSmall, Kind
from avmp_vllm.core.capacity import binding_pool
from avmp_vllm.core.extents import default_chunk_bytes
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.core.tables import Role
from avmp_vllm.models import drafts
from avmp_vllm.models.shapes import ShapeError, read_shape
from avmp_vllm.planner.backends import BACKENDS, LATENT_BACKENDS, SPARSE_BACKENDS
from avmp_vllm.planner.cards import CARDS, GENERATIONS, RESERVE, budget
from avmp_vllm.planner.plan import STEP_TOKENS, Plan, make_plan

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="config.json, model folder, or hub name")
    parser.add_argument("--memory", type=parse_bytes, help="bytes for the cache, such as 5GiB")
    parser.add_argument("--gpu", help=f"instead of --memory: {', '.join(CARDS)}")
    parser.add_argument("--lengths", type=parse_lengths, default=parse_lengths("64,256,1k,4k,32k"))
    parser.add_argument("--kv-dtype", default="auto", help="of the attention cache, such as fp8")
    parser.add_argument("--state-dtype", default="auto", help="of the SSM state, such as float32")
    parser.add_argument("--page-tokens", type=int, help="instead of the backend's smallest page")
    parser.add_argument(
        "--backend",
        choices=[*BACKENDS, *LATENT_BACKENDS, *SPARSE_BACKENDS],
        metavar="NAME",
        help="attention backend, such as FLASHMLA or CPU_ATTN; by default what the card gets",
    )
    parser.add_argument(
        "--stock-unit", type=int, help="stock's block is a multiple of this, whatever the backend"
    )
    parser.add_argument("--max-model-len", type=int, help="for vLLM's own capacity figure")
    parser.add_argument(
        "--step-tokens",
        type=int,
        default=STEP_TOKENS,
        help=f"tokens in flight, which bound the pages of a window ({STEP_TOKENS:,})",
    )
    parser.add_argument(
        "--no-prefix-caching", action="store_true", help="one state a sequence, not two"
    )
    parser.add_argument(
        drafts.OPTION,
        metavar="JSON",
        help=f"as vLLM takes it: method ({', '.join(drafts.METHODS)}), num_speculative_tokens, and "
        "the drafter's model if it has one",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="result file, for `avmp plot`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--parameters", type=float, help="with --gpu: parameters, such as 3e9")
    parser.add_argument("--weight-dtype", default="auto", help="with --gpu: such as fp8")
    parser.add_argument("--reserve", type=parse_bytes, default=RESERVE, help="with --gpu (1GiB)")


def _print_layers(console: Console, plan: Plan) -> None:
    shape = plan.shape
    console.print(f"{shape.name} ({shape.model_type}):")
    for layer, cache in zip(shape.layers, plan.layers.caches, strict=True):
        console.print(
            f"  {layer.layers} x {layer.what}, {layer.role.value}: {cache.entry_bytes:,} bytes "
            + _entry(layer.role, cache.entry_tokens)
        )
    for note in (f"source: {shape.source}" if shape.source else "", *shape.assumed):
        if note:
            console.print(f"  {'' if note.startswith('source') else 'assumed: '}{note}")
    if plan.drafts is not None:
        console.print(
            f"  drafts: {plan.drafts.tokens} tokens by {plan.drafts.method}, a state more for each"
        )
    assumed = plan.assumed
    console.print(
        f"attention backend: {assumed.backend.name} ({assumed.why}), pages of a multiple of "
        f"{assumed.page_tokens:,} tokens"
    )


def _entry(role: Role, tokens: int) -> str:
    if role is Role.STATE:
        return "a state"
    if role is Role.RING:
        return "an entry"
    return "a token" if tokens == 1 else f"for {tokens} tokens"


def _print_sizes(console: Console, plan: Plan, caching: bool) -> None:
    geometry, stock = plan.geometry, plan.stock
    table = Table(title=f"{geometry.arena_bytes:,} bytes for the cache")
    for column in ("", "stock vLLM", f"static {plan.static.ratio:g}", "AVMP"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, of_stock: str | None, *others: str) -> None:
        table.add_row(name, "-" if of_stock is None else of_stock, *others)

    exact, state = f"{geometry.page_bytes:,}", f"{geometry.block_bytes:,}"
    block = stock and f"{stock.block_tokens:,}"
    padding = plan.stock_padding
    padded = None if padding is None else f"{plan.stock_state_bytes:,} (+{padding:.1%})"
    row("tokens of a KV block", block, *[str(geometry.page_tokens)] * 2)
    row("bytes of a KV page", stock and f"{stock.block_bytes:,} (one group)", exact, exact)
    row("bytes of one state, all layers", padded, state, state)
    tables = str(len(plan.tables) + 1)
    row("block tables", stock and str(stock.tables), tables, tables)
    row("blocks", stock and f"{stock.blocks:,}", "", "")
    row("KV pages at most", "", f"{plan.static.pages:,}", f"{geometry.page_limit:,}")
    row("SSM blocks at most", "", f"{plan.static.blocks:,}", f"{geometry.block_limit:,}")
    if not caching:
        row("prefix hits land on (tokens)", *("off",) * 3)
    else:
        row("prefix hits land on (tokens)", block, *[str(geometry.page_tokens)] * 2)
        kept = stock and f"every {stock.block_tokens:,} tokens"
        row("a state is kept", kept, *["by its worth"] * 2)
    console.print(table)


def _print_tables(console: Console, plan: Plan) -> None:
    """AVMP's block tables, where there are more than one a pool."""
    if len(plan.tables) == 1:
        return
    table = Table(title="AVMP's block tables")
    for column in ("a request holds", "layers", "tokens a page", "pages", "bytes used of a page"):
        table.add_column(column, justify="left" if column.startswith("a ") else "right")
    for one in plan.tables:
        most = "one each" if one.group.most == 1 else f"{one.group.most} at most"
        table.add_row(
            one.role.value,
            str(one.layers),
            f"{one.group.page_tokens:,}",
            "by length" if one.group.most is None else most,
            f"{one.page_bytes:,}",
        )
    states = sum(cache.layers for cache in plan.layers.states)
    table.add_row(Role.STATE.value, str(states), "", "", f"{plan.layers.state_bytes:,}")
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
        real = {name: fit[name] or 0 for name in ("stock", "static", "AVMP")}
        table.add_row(
            f"{tokens:,}",
            *("-" if n is None else f"{n:,} / {n * tokens:,}" for n in fit.values()),
            plan.static.binding(tokens, plan.states).name,
            binding_pool(plan.geometry, tokens, plan.states).name,
            ", ".join(name for name, count in real.items() if count == max(real.values())),
        )
    console.print(table)


def _as_json(plan: Plan, lengths: list[int]) -> dict[str, Any]:
    """The plan for machines."""
    shape, geometry, stock = plan.shape, plan.geometry, plan.stock
    return {
        "model": shape.name,
        "model_type": shape.model_type,
        "arena_bytes": geometry.arena_bytes,
        "states": plan.states,
        "speculative_tokens": 0 if plan.drafts is None else plan.drafts.tokens,
        "backend": plan.assumed.backend.name,
        "backend_why": plan.assumed.why,
        "layers": [
            {
                "kind": layer.what,
                "role": layer.role.name.lower(),
                "layers": layer.layers,
                "entry_bytes": cache.entry_bytes,
                "entry_tokens": cache.entry_tokens,
            }
            for layer, cache in zip(shape.layers, plan.layers.caches, strict=True)
        ],
        "page_bytes": geometry.page_bytes,
        "block_bytes": geometry.block_bytes,
        "tables": [
            {
                "role": one.role.name.lower(),
                "layers": one.layers,
                "page_tokens": one.group.page_tokens,
                "most_pages": one.group.most,
                "bytes": one.page_bytes,
            }
            for one in plan.tables
        ],
        "stock": stock
        and {
            "block_tokens": stock.block_tokens,
            "block_bytes": stock.block_bytes,
            "tables": stock.tables,
            "blocks": stock.blocks,
        },
        "fits": [{"tokens": tokens} | plan.sequences(tokens) for tokens in lengths],
    }


def _write(path: Path, plan: Plan, lengths: list[int]) -> None:
    """Write what fits as a result file."""
    from avmp_vllm.bench import results

    content = {
        "format": results.FORMAT,
        "benchmark": "plan",
        "environment": results.environment(None, ()),
        "parameters": {
            "model": plan.shape.name,
            "arena_bytes": plan.geometry.arena_bytes,
            "states": plan.states,
            "static_ratio": plan.static.ratio,
        },
        "counts": {
            "tokens": lengths,
            "sequences": [plan.sequences(tokens) for tokens in lengths],
            "page_tokens": plan.geometry.page_tokens,
            "stock_block_tokens": plan.stock and plan.stock.block_tokens,
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
            soft_wrap=True,
            highlight=False,
            width=None if sys.stdout.isatty() else 160,
            quiet=args.json,
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
            step_tokens=args.step_tokens,
            backend=args.backend,
            generation=GENERATIONS.get(args.gpu),
            drafts=drafts.Drafts.read(given) if (given := args.speculative_config) else None,
        )
    except (ShapeError, ArenaTooSmall) as error:
        print(f"avmp plan: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(_as_json(plan, args.lengths), indent=1))
    else:
        _print(console, plan, args)
    if args.output:
        _write(args.output, plan, args.lengths)
    return 0


def _print(console: Console, plan: Plan, args: argparse.Namespace) -> None:
    _print_layers(console, plan)
    _print_sizes(console, plan, not args.no_prefix_caching)
    _print_tables(console, plan)
    _print_capacity(console, plan, args.lengths)
    if not args.no_prefix_caching:
        warm = ", ".join(
            f"{plan.geometry.sequences(tokens):,} of {tokens:,}" for tokens in args.lengths
        )
        console.print(
            f"AVMP keeps warm, while nothing runs, conversations of so many tokens: {warm} "
            "(each a state and its pages)"
        )
    if plan.stock is None:
        console.print("stock vLLM: its rules have no plan for these layers")
    else:
        logged = plan.stock.logged_tokens(plan.max_model_len)
        console.print(
            f"stock vLLM would log: KV cache size: {logged:,} tokens "
            f"(for {plan.max_model_len:,} tokens a request)"
        )
    chunk = default_chunk_bytes(plan.geometry.arena_bytes)
    rest = ceil_div(plan.geometry.null_bytes, chunk) * chunk
    console.print(
        f"with memory: elastic the same fits, in chunks of {chunk:,} bytes; at rest with an empty "
        f"prefix cache {rest:,} bytes have memory instead of {plan.geometry.arena_bytes:,}"
    )
    usable = plan.geometry.longest(0)
    console.print(
        f"AVMP at most: {usable:,} tokens if no state is live; no split is fixed, "
        f"{Kind.KV.name} and {Kind.SSM.name} share every byte"
    )
    console.print(
        "static: AVMP's exact pages under SGLang's default split (state : KV bytes); "
        "SGLang's own page sizes and prefix granularity may differ"
    )
