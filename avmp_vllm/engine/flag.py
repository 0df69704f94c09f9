"""``--block-manager`` on vLLM's command line.

vLLM's ``EngineArgs`` is a dataclass that drops arguments it does not know, so the flag's value
travels in ``additional_config``. It is merged there after parsing, so that ``--additional-config``
may stand before or after the flag.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from avmp_vllm.engine.config import BLOCK_MANAGERS

#: Attribute of engine arguments that came from a command line; their errors need no traceback.
FROM_COMMAND_LINE = "avmp_from_command_line"

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
        if manager is not None and manager != additional.get("block_manager", "default"):
            args.additional_config = {**additional, "block_manager": manager}
        engine_args = stock(cls, args)
        setattr(engine_args, FROM_COMMAND_LINE, True)
        return engine_args

    return wrapper
