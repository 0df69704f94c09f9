"""Reading a server's metrics over HTTP."""

from __future__ import annotations

import ipaddress
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from avmp_vllm.top.reading import AVMP, Page

_TIMEOUT_S = 5.0
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class TopError(Exception):
    """What keeps a server from being watched, in one line."""


def server_address(url: str) -> str:
    """Address of a server; ``host:port`` is enough."""
    return (url if "//" in url else f"http://{url}").rstrip("/").removesuffix("/metrics")


def metrics_address(url: str) -> str:
    """Address of a server's metrics; ``host:port`` is enough."""
    return f"{server_address(url)}/metrics"


def fetch(address: str) -> Page:
    """Read a page of metrics.

    Raises:
        TopError: There is none, or it is not of a server that AVMP serves.
    """
    server = address.removesuffix("/metrics")
    try:
        with opener_of(address)(address, timeout=_TIMEOUT_S) as response:
            page = Page(response.read().decode(), time.monotonic())
    except (OSError, HTTPException, ValueError) as error:  # HTTP errors are OSErrors
        reason = getattr(error, "reason", None) or error
        raise TopError(
            f"no metrics at {address}: {reason}; is `vllm serve` running there?"
        ) from None
    if not page.has("vllm:"):
        raise TopError(
            f"{address} has no metrics of vLLM; is it `vllm serve`, without --disable-log-stats?"
        )
    if not page.has(AVMP):
        raise TopError(
            f"{server} runs vLLM without AVMP; start it with "
            "`vllm serve MODEL --block-manager avmp`"
        )
    return page


def opener_of(address: str) -> Callable[..., Any]:
    """What opens an address: without a proxy if it is on this machine."""
    return _NO_PROXY.open if _is_local(address) else urllib.request.urlopen


def _is_local(address: str) -> bool:
    """Whether no proxy stands between here and there."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
