"""``avmp doctor``: is this machine, and is this command line, ready for AVMP?"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from avmp_vllm.doctor import installation
from avmp_vllm.doctor.check import Check


class Found(NamedTuple):
    """A check under the heading that it belongs to."""

    section: str
    check: Check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.usage = "avmp doctor [--json] [MODEL ...]"
    parser.description = (
        "Check this installation; followed by the arguments of a `vllm serve` line, check that too."
    )
    parser.allow_abbrev = False  # `--js` may be an option of vLLM's
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    # What is not known here is vLLM's: see cli.main.
    parser.set_defaults(serve_arguments=[])


def examine(serve_arguments: Sequence[str]) -> Iterator[Found]:
    """Every check, as soon as it is known."""
    install = "installation"
    vllm_fits = True
    for check in installation.check_versions():
        vllm_fits &= check.mark != "fail"
        yield Found(install, check)
    if not vllm_fits:
        return  # the rest would only say so again
    platform = installation.check_platform()
    yield Found(install, platform)
    plugin = installation.check_plugin()
    yield Found(install, plugin)
    for check in installation.check_seams():
        yield Found(install, check)
    yield Found(install, installation.check_triton(platform.data.get("kind") == "cuda"))
    for check in installation.check_environment():
        yield Found(install, check)
    if serve_arguments and plugin.mark == "ok":
        yield from _examine_line(serve_arguments)


def _examine_line(serve_arguments: Sequence[str]) -> Iterator[Found]:
    from avmp_vllm.doctor.fit import check_fit
    from avmp_vllm.doctor.serve_line import check_serve_line

    section = "vllm serve " + shlex.join(serve_arguments)
    for found in check_serve_line(serve_arguments):
        if isinstance(found, Check):
            yield Found(section, found)
        else:
            for check in check_fit(found):
                yield Found(section, check)


def _silence() -> None:
    """Keep vLLM's log out of the report; it names what matters here in its own words."""
    os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"  # it goes to standard output
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Warnings of vLLM's import come before it sets its own logging up.
    logging.getLogger("vllm").addHandler(logging.NullHandler())


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if a check failed."""
    _silence()
    found: list[Found] = []
    section = ""
    for item in examine(args.serve_arguments):
        found.append(item)
        if args.json:
            continue
        if item.section != section:
            print(("\n" if section else "") + item.section)
            section = item.section
        print("\n".join(item.check.lines()), flush=True)
    failed, warned = (sum(item.check.mark == mark for item in found) for mark in ("fail", "warn"))
    if args.json:
        checks = [{"section": item.section, **item.check.as_json()} for item in found]
        print(json.dumps({"ok": not failed, "checks": checks}, indent=1))
    elif failed:
        print(f"\n{failed} to mend, each with its way out (->)")
    else:
        print(f"\nnothing to mend, {warned} to know" if warned else "\nall is well")
    return 1 if failed else 0
