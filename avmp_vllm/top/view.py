"""A reading as text: the arena as a bar, and the figures that matter beside it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from avmp_vllm.top.reading import AVMP, Band, Reading

#: Okabe and Ito's colours, as in the pictures of the documentation; the glyphs tell the parts apart
#: where there is no colour.
COLOURS = {"kv": "#0072B2", "ssm": "#E69F00"}
NAMES = {"kv": "KV", "ssm": "SSM"}
USED, CACHED, FREE = "█", "▒", "·"
_NONE = "-"


def frame(reading: Reading, source: str, width: int, note: str = "") -> RenderableType:
    """One picture of a server.

    Args:
        reading: What its metrics say.
        source: Its address.
        width: Columns of the terminal.
        note: A line for the end, such as why the figures stand still.
    """
    engines = f", {reading.engines} engines" if reading.engines > 1 else ""
    head = Text.assemble(
        ("avmp top", "bold"), f"  {source}  {reading.model}{engines}  over {reading.seconds:.1f} s"
    )
    parts: list[RenderableType] = [head, Text()]
    if any(band.capacity for band in reading.bands.values()):
        parts += [bar(reading, width), _legend(reading), Text(), _bands(reading)]
        parts += [Text(), states(reading)]
    else:
        parts.append(Text("The arena is not laid out yet; it is with the first request."))
    parts += [Text(), _figures(reading)]
    if note:
        parts += [Text(), Text(note, style="bold")]
    return Group(*parts)


def bar(reading: Reading, width: int) -> Text:
    """The arena to scale: KV's band, what is between, SSM's band."""
    kv, ssm = reading.bands["kv"], reading.bands["ssm"]
    segments = [
        *((glyph, size, COLOURS["kv"]) for glyph, size in _segments(kv)),
        (FREE, reading.gap_bytes, ""),
        *((glyph, size, COLOURS["ssm"]) for glyph, size in reversed(_segments(ssm))),
    ]
    columns = share_out([size for _, size, _ in segments], max(width - 2, 1))
    text = Text("[")
    for (glyph, _, colour), count in zip(segments, columns, strict=True):
        text.append(glyph * count, style=colour)
    text.append("]")
    return text


def _segments(band: Band) -> list[tuple[str, float]]:
    """Glyph and bytes of a band's parts."""
    counts = ((USED, band.used), (CACHED, band.cached), (FREE, band.free))
    return [(glyph, count * band.page_bytes) for glyph, count in counts]


def share_out(sizes: list[float], columns: int) -> list[int]:
    """Columns for parts of some sizes, all of them and rounded fairly; each part seen gets one.

    The largest parts give to those that would vanish.
    """
    whole = sum(sizes)
    if not whole:
        return [0] * len(sizes)
    exact = [size / whole * columns for size in sizes]
    shares = [max(int(share), 1 if share else 0) for share in exact]
    while sum(shares) != columns:
        step = 1 if sum(shares) < columns else -1
        worst = max(range(len(sizes)), key=lambda i: (exact[i] - shares[i]) * step)
        shares[worst] += step
    return shares


def _legend(reading: Reading) -> Text:
    kv, ssm = reading.bands["kv"], reading.bands["ssm"]
    free = kv.free * kv.page_bytes + ssm.free * ssm.page_bytes + reading.gap_bytes
    return Text.assemble(
        (f"{USED} KV", COLOURS["kv"]),
        f"   {CACHED} cached   {FREE} free ({size(free)})   ",
        (f"SSM {USED}", COLOURS["ssm"]),
    )


def _bands(reading: Reading) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("band")
    for name in ("bytes", "pages", "used", "cached", "free", "evicted", "moved pages", "failures"):
        table.add_column(name, justify="right")
    for pool, band in reading.bands.items():
        moved = reading.total(f"{AVMP}relocations_total", pool=pool)
        moved_bytes = reading.total(f"{AVMP}relocated_bytes_total", pool=pool)
        table.add_row(
            Text(NAMES[pool], style=COLOURS[pool]),
            size(band.capacity_bytes),
            f"{band.capacity:,}",
            f"{band.used:,}",
            f"{band.cached:,}",
            f"{band.free:,}",
            f"{reading.total(f'{AVMP}evictions_total', pool=pool):,.0f}",
            f"{moved:,.0f} ({size(moved_bytes)})",
            f"{reading.total(f'{AVMP}allocation_failures_total', pool=pool):,.0f}",
        )
    return table


def states(reading: Reading) -> Text:
    """Two lines: the states that are kept, and those that were hit of all that were asked for."""
    kinds = reading.now.label(f"{AVMP}states_kept", "state")
    kept, asked = [], []
    for kind in kinds:
        name = kind.replace("_", " ")
        if count := reading.total(f"{AVMP}states_kept", state=kind):
            kept.append(f"{name} {count:,.0f}")
        hits = reading.total(f"{AVMP}state_hits_total", state=kind)
        if wanted := hits + reading.total(f"{AVMP}state_misses_total", state=kind):
            asked.append(f"{name} {hits:,.0f} of {wanted:,.0f}")
    return Text.assemble(
        ("states kept  ", "bold"),
        ", ".join(kept) or _NONE,
        ("\nstate hits   ", "bold"),
        ", ".join(asked) or _NONE,
    )


def _figures(reading: Reading) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("total", justify="right")
    table.add_column("a second", justify="right")
    for direction, label in (("kv_to_ssm", "KV to SSM"), ("ssm_to_kv", "SSM to KV")):
        _counter(table, reading, f"migrations {label}", f"{AVMP}migrations_total", direction)
    moved = reading.rate(f"{AVMP}relocated_bytes_total")
    total = size(reading.total(f"{AVMP}relocated_bytes_total"))
    table.add_row("relocated", total, _NONE if moved is None else size(moved))
    _counter(table, reading, "preemptions", "vllm:num_preemptions_total")
    _counter(table, reading, "prompt tokens", "vllm:prompt_tokens_total")
    _counter(table, reading, "answer tokens", "vllm:generation_tokens_total")
    hits = reading.ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
    since = reading.total("vllm:prefix_cache_queries_total")
    overall = reading.total("vllm:prefix_cache_hits_total") / since if since else None
    first = reading.mean("vllm:time_to_first_token_seconds")
    between = reading.mean("vllm:inter_token_latency_seconds")
    beside = Table(box=None, pad_edge=False, show_header=False)
    beside.add_column()
    beside.add_column(justify="right")
    beside.add_row("requests running", f"{reading.total('vllm:num_requests_running'):,.0f}")
    beside.add_row("requests waiting", f"{reading.total('vllm:num_requests_waiting'):,.0f}")
    beside.add_row("prefix hits, window", _percent(hits))
    beside.add_row("prefix hits, ever", _percent(overall))
    beside.add_row("first token, mean", _milliseconds(first))
    beside.add_row("between tokens, mean", _milliseconds(between))
    both = Table.grid(padding=(0, 4))
    both.add_row(table, Group(Text(), beside))
    return both


def _counter(table: Table, reading: Reading, label: str, name: str, direction: str = "") -> None:
    labels = {"direction": direction} if direction else {}
    rate = reading.rate(name, **labels)
    shown = _NONE if rate is None else f"{rate:,.1f}"
    table.add_row(label, f"{reading.total(name, **labels):,.0f}", shown)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{share:.1%}"


def _milliseconds(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{seconds * 1000:,.1f} ms"
