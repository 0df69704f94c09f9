"""``avmp top``: watch a running server's arena in a terminal."""

from __future__ import annotations

import argparse
import sys
import time

DEFAULT_URL = "http://localhost:8000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "url", nargs="?", default=DEFAULT_URL, help=f"server (default {DEFAULT_URL})"
    )
    parser.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="S", help="seconds between frames (2)"
    )
    parser.add_argument("--once", action="store_true", help="print one frame, over one interval")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return value


def run(args: argparse.Namespace) -> int:
    """Draw frames until interrupted, or one."""
    try:
        from avmp_vllm.top.client import TopError
    except ImportError as error:  # vLLM brings it, but a machine that only watches has no vLLM
        return _error(f"{error.name} is missing: pip install prometheus-client", 2)
    if not args.once and not sys.stdout.isatty():
        return _error("this is no terminal; use --once", 2)
    try:
        _watch(args.url, args.interval, args.once)
    except TopError as error:
        return _error(str(error), 1)
    except KeyboardInterrupt:  # the way to end it
        pass
    return 0


def _error(message: str, status: int) -> int:
    print(f"avmp top: error: {message}", file=sys.stderr)
    return status


def _watch(url: str, interval_s: float, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from avmp_vllm.top.client import TopError, fetch, metrics_address
    from avmp_vllm.top.reading import Reading
    from avmp_vllm.top.view import frame

    console = Console(highlight=False)
    address = metrics_address(url)
    server = address.removesuffix("/metrics")
    before = now = fetch(address)
    if once:
        time.sleep(interval_s)
        console.print(frame(Reading(before, fetch(address)), server, console.width))
        return
    note = ""
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            picture = frame(Reading(before, now), server, console.width, note)
            live.update(picture, refresh=True)
            time.sleep(interval_s)
            try:
                before, now, note = now, fetch(address), ""
            except TopError as error:  # a server that restarts is watched on
                note = str(error)
