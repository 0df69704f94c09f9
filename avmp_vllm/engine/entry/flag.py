"""``--block-manager`` on vLLM's command line.

vLLM's ``EngineArgs`` is a dataclass that drops arguments it does not know and whose attributes are
handed on as keywords, so the flag's value travels in ``additional_config`` and nothing else is
added. It is merged there after parsing, so that ``--additional-config`` may stand before or after
the flag.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from avmp_vllm.engine.entry import last_line
from avmp_vllm.engine.entry.config import BLOCK_MANAGERS, ConfigError, selected

HELP = (
    "Who manages the cache of a hybrid attention/SSM model: vLLM itself (default), or AVMP, which "
    "gives each kind of layer pages of its own size and moves capacity between them. Its options "
    """go into --additional-config '{"avmp": {...}}'."""
)


def add_cli_args(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.add_cli_args``: add the flag."""

    def wrapper(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = stock(parser)
        group = parser.add_argument_group(title="AVMP", description="Options of the AVMP plugin.")
        group.add_argument("--block-manager", choices=BLOCK_MANAGERS, default=None, help=HELP)
        return parser

    return wrapper


def from_cli_args(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.from_cli_args``: carry the flag's value into ``additional_config``."""

    def wrapper(cls: type, args: argparse.Namespace) -> Any:
        manager = getattr(args, "block_manager", None)
        additional = getattr(args, "additional_config", None) or {}
        if manager == "avmp" or _names_avmp(additional):
            last_line.print_at_the_end()
            args.additional_config = _merge(manager, additional)
            # Options that are wrong end the command here, not in a process that it starts.
            selected(args.additional_config)
        return stock(cls, args)

    return wrapper


def _names_avmp(additional: object) -> bool:
    return isinstance(additional, dict) and not {"block_manager", "avmp"}.isdisjoint(additional)


def _merge(manager: str | None, additional: object) -> dict[str, Any]:
    """``additional_config`` with the flag's value in it; the flag wins.

    Raises:
        ConfigError: There is no mapping to put it into.
    """
    if not isinstance(additional, dict):
        raise ConfigError(
            f"--additional-config {additional} is not a mapping, and --block-manager {manager} "
            """needs one: write '{"avmp": {...}}' with AVMP's options in it, or leave it out"""
        )
    return additional if manager is None else {**additional, "block_manager": manager}
