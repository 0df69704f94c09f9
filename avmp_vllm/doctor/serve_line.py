"""A ``vllm serve`` command line: everything that AVMP refuses, at once.

The engine stops at the first option that it cannot honour. Here a refused option is reported, taken
back to its default, and the rest is looked at again, with vLLM's own parser and configuration.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from avmp_vllm.doctor.check import Check, fail, ok, one_line, refusal_of, warn

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from avmp_vllm.engine.entry.options import Refusal

#: Parts of ``VllmConfig`` whose fields are fields of the engine arguments.
_PARTS = ("model_config", "cache_config", "parallel_config", "scheduler_config")
_REMOVE = "remove it, or use --block-manager default"
_STOCKS_OWN = "vLLM itself says so, with or without AVMP: mend the command line first"


class _Asked:
    """Engine arguments under the names that they have in a ``VllmConfig``.

    The table of refusals reads configurations, and vLLM may not build one that AVMP refuses.
    """

    def __init__(self, engine_args: EngineArgs) -> None:
        self._args = engine_args

    def __getattr__(self, name: str) -> Any:
        if name in _PARTS:
            return self
        value = getattr(self._args, name, None)
        return SimpleNamespace(**{"method": None, **value}) if isinstance(value, dict) else value


def check_serve_line(words: Sequence[str]) -> Iterator[Check | VllmConfig]:
    """Check a command line.

    Args:
        words: What follows ``vllm serve``.

    Yields:
        Checks; last, if it can be built, the configuration without what is refused.
    """
    try:
        engine_args, ours = _parse(words)
    except Exception as error:  # a configuration file may be wrong in any way
        yield fail("arguments", one_line(error), "see `vllm serve --help=all`")
        return
    manager = ours.pop("block_manager", None)
    if manager is None:
        yield ok("block manager", "checked as with --block-manager avmp, which is not given")
    elif manager != "avmp":
        yield warn("block manager", f"{manager}; checked as avmp", "give --block-manager avmp")
    else:
        yield ok("block manager", "avmp")
    options = _options(ours.pop("avmp", {}))
    if isinstance(options, Check):
        yield options
        options = {}
    engine_args.additional_config = {**ours, "block_manager": "avmp", "avmp": options}
    yield from _build(engine_args)


def _parse(words: Sequence[str]) -> tuple[EngineArgs, dict[str, Any]]:
    """vLLM's parser on a command line: engine arguments without ours, and ``additional_config``.

    The plugin stops at the first of our own options that is wrong, so it does not see them here.

    Raises:
        ValueError: With the parser's message.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from avmp_vllm.engine.entry import minors

    parser = FlexibleArgumentParser(prog="vllm")
    serve = minors.serve_arguments()
    serve.make_arg_parser(parser.add_subparsers(dest="subparser").add_parser("serve"))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            args = parser.parse_args(["serve", *words])
        except SystemExit:
            message = said.getvalue().strip().rpartition("error: ")[2]
            raise ValueError(message or "the parser ended") from None
    try:
        serve.validate_parsed_serve_args(args)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if args.model_tag:
        args.model = args.model_tag  # as `vllm serve` does
    ours = args.additional_config or {}
    if not isinstance(ours, dict):
        raise ValueError(f"--additional-config {ours} is not a mapping")
    manager = args.block_manager
    args.additional_config, args.block_manager = {}, None
    engine_args = AsyncEngineArgs.from_cli_args(args)
    return engine_args, {**ours, **({"block_manager": manager} if manager else {})}


def _options(given: object) -> dict[str, Any] | Check:
    """AVMP's own options, or what is wrong with them."""
    from avmp_vllm.engine.entry.config import AVMPConfig, ConfigError

    try:
        return AVMPConfig.read(given).model_dump()
    except ConfigError as error:
        return fail("AVMP option", one_line(error), "mend it; README.md has the table of options")


def _build(engine_args: EngineArgs) -> Iterator[Check | VllmConfig]:
    """Build the configuration, taking back and reporting what is refused."""
    from avmp_vllm.engine.entry.config import ConfigError
    from avmp_vllm.engine.entry.options import REFUSALS

    refused = 0
    for refusal in REFUSALS:
        value = _asked_value(refusal, engine_args)
        if refusal.stands(value):
            refused += 1
            yield _refused(refusal, value)
            _take_back(engine_args, refusal.option)
    while True:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                config = copy.copy(engine_args).create_engine_config()
        except ConfigError as error:
            refused += 1
            yield refusal_of("refused", error)
            option = re.match(r"--[\w.-]+", str(error))
            if option and _take_back(engine_args, option[0]):
                continue
            return
        except (Exception, SystemExit) as error:
            yield fail("vLLM", one_line(error)[:400], _STOCKS_OWN)
            return
        break
    if not refused:
        yield ok("options", "AVMP refuses none of them")
    yield config


def _asked_value(refusal: Refusal, engine_args: EngineArgs) -> object:
    """The value that a refusal looks at; None where the arguments do not tell."""
    try:
        return refusal.value(_Asked(engine_args))  # type: ignore[arg-type]
    except AttributeError:  # known only once the configuration is built
        return None


def _refused(refusal: Refusal, value: object) -> Check:
    # A flag's value says nothing.
    shown = refusal.option if value is True else f"{refusal.option} {value}"
    return fail("refused", f"{shown}: {refusal.why}", _REMOVE, option=refusal.option)


def _take_back(engine_args: EngineArgs, option: str) -> bool:
    """Give an option its default; False if it has it already or the arguments do not hold it."""
    owner: Any = engine_args
    *path, name = option.removeprefix("--").replace("-", "_").split(".")
    for part in path:
        owner = getattr(owner, part, None)
    if not hasattr(owner, name):
        return False
    default = getattr(type(owner)(), name)
    if getattr(owner, name) == default:
        return False
    setattr(owner, name, default)
    return True
