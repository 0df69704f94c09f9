"""The ``avmp`` command.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> int``. It is imported only
when it is asked for, so that ``avmp plan`` does not pay for importing torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NamedTuple

from avmp_vllm.version import __version__


class Command(NamedTuple):
    """Where a command lives and what it is for."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "plan": Command("avmp_vllm.planner.command", "what fits: stock vLLM, a static split, AVMP"),
    "doctor": Command("avmp_vllm.doctor.command", "is this machine, or command line, ready?"),
    "top": Command("avmp_vllm.top.command", "watch a running server's arena"),
    "memory": Command("avmp_vllm.top.memory", "show and set a running server's memory budget"),
    "tiny-jamba": Command("avmp_vllm.models.tiny_jamba", "write a tiny Jamba checkpoint"),
    "demo": Command("avmp_vllm.demo.run", "serve, replay conversations, compare with stock vLLM"),
    "plot": Command("avmp_vllm.plots.command", "draw a result file of `avmp bench`"),
}

BENCHMARKS: dict[str, Command] = {
    "paper": Command("avmp_vllm.bench.paper.command", "the paper's grid, reproduced and corrected"),
    "allocator": Command(
        "avmp_vllm.bench.allocator", "pages, requests, migration and size against vLLM's own pools"
    ),
    "scheduler": Command(
        "avmp_vllm.bench.scheduler.command", "vLLM's real scheduler on real traces, no model"
    ),
    "prefix": Command(
        "avmp_vllm.bench.prefix.command", "which rules of a prefix cache hit what, by memory"
    ),
    "memory": Command(
        "avmp_vllm.bench.memory.command", "what driver calls cost, and what each rule keeps backed"
    ),
    "predict": Command(
        "avmp_vllm.bench.predict.command", "how well answer lengths are forecast, on any trace"
    ),
    "serve": Command("avmp_vllm.bench.serve.command", "AVMP and stock vLLM in turn, over HTTP"),
    "engine": Command(
        "avmp_vllm.bench.engine.command", "AVMP and stock vLLM as whole engines, stepped in turn"
    ),
    "bands": Command("avmp_vllm.bench.bands", "record a live engine's bands, for `avmp plot`"),
    "scan": Command("avmp_vllm.bench.scan", "the compiled scan of Mamba-1 on CPU"),
    "kernels": Command("avmp_vllm.bench.kernels", "the Triton kernels on a GPU: right, then fast"),
}


def _add(subparsers: argparse._SubParsersAction, table: dict[str, Command], chosen: str) -> None:
    """Add every command's name and help, and the arguments of the chosen one."""
    for name, command in table.items():
        parser = subparsers.add_parser(name, help=command.help, description=command.help)
        if name == chosen:
            module = importlib.import_module(command.module)
            module.add_arguments(parser)
            parser.set_defaults(run=module.run)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the process exit status."""
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if not word.startswith("-")] + ["", ""]
    parser = argparse.ArgumentParser(prog="avmp", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"avmp-vllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add(commands, COMMANDS, words[0])
    if BENCHMARKS:
        bench = commands.add_parser("bench", help="measure, always against a baseline")
        benches = bench.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
        _add(benches, BENCHMARKS, words[1] if words[0] == "bench" else "")
    args, others = parser.parse_known_args(argv)
    if hasattr(args, "serve_arguments"):  # a command that takes those of `vllm serve` as well
        args.serve_arguments = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
