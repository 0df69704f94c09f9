"""``avmp memory``: show and set how much memory a running server's elastic arena may have."""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from avmp_vllm.top.client import TopError, opener_of, server_address

DEFAULT_URL = "http://localhost:8000"
PATH = "/v1/avmp/memory"
#: Lowering a budget waits for the step that runs, and for the device.
_TIMEOUT_S = 120.0

#: What is printed of an answer, and how it is called.
ROWS = (
    ("budget", "may have memory at most"),
    ("virtual_bytes", "addresses, to which the budget can be raised"),
    ("least_budget", "the least budget, for one request of max_model_len"),
    ("backed", "has memory now"),
    ("held", "held by requests, the prefix cache and the null pages"),
    ("over", "held by requests beyond the budget, goes when they end"),
    ("given_back_now", "given back by this command"),
    ("given_back", "given back since the start"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "url", nargs="?", default=DEFAULT_URL, help=f"server (default {DEFAULT_URL})"
    )
    parser.add_argument(
        "--budget", metavar="SIZE", help="bytes that may have memory at most, such as 20GiB"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help="of the server (default: $VLLM_API_KEY, if set)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Ask the server, and print its answer."""
    key = args.api_key or os.environ.get("VLLM_API_KEY")
    try:
        answer = ask(args.url, args.budget, key)
    except TopError as error:
        print(f"avmp memory: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer, indent=1) if args.json else describe(answer))
    return 0


def ask(url: str, budget: str | None = None, key: str | None = None) -> dict[str, Any]:
    """What a server says of its arena's memory, after setting the budget if one is given.

    Raises:
        TopError: It says nothing, or refuses.
    """
    server = server_address(url)
    request = urllib.request.Request(f"{server}{PATH}")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    if budget is not None:
        request.data = json.dumps({"budget": budget}).encode()
        request.add_header("Content-Type", "application/json")
    try:
        with opener_of(server)(request, timeout=_TIMEOUT_S) as response:
            answer: dict[str, Any] = json.loads(response.read())
            return answer
    except urllib.error.HTTPError as error:
        raise TopError(_refusal(server, error)) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise TopError(f"no answer from {server}: {reason}; is `vllm serve` running?") from None


def _refusal(server: str, error: urllib.error.HTTPError) -> str:
    """An answer that is an error, in one line."""
    if error.code == 404:
        return (
            f"{server} has no {PATH}: start it with VLLM_SERVER_DEV_MODE=1 and --block-manager avmp"
        )
    if error.code == 401:
        return f"{server} wants its API key: give --api-key, or set VLLM_API_KEY"
    try:
        said = json.loads(error.read())["error"]
    except (ValueError, KeyError, TypeError):
        said = f"{error.code} {error.reason}"
    return f"{server} refuses: {said}"


def describe(answer: dict[str, Any]) -> str:
    """An answer as lines of text."""
    lines = [f"memory: {answer['memory']}"]
    lines += [f"{answer[key]:>20,}  {text}" for key, text in ROWS if key in answer]
    if calls := answer.get("calls"):
        counts = ", ".join(f"{kind} {count:,}" for kind, count in calls.items())
        lines.append(
            f"driver calls since the start: {counts}; waits for the device: "
            f"{answer['fence_waits']:,}"
        )
    return "\n".join(lines)
