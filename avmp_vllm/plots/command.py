"""``avmp plot``: draw a result file, as PNG and SVG."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from avmp_vllm.bench import results
from avmp_vllm.bench.inputs import InputError

#: Benchmark that wrote a result -> module and function that draw it.
PICTURES = {
    "bands": ("avmp_vllm.plots.bands", "draw"),
    "serve": ("avmp_vllm.plots.ratios", "draw_serve"),
    "engine": ("avmp_vllm.plots.ratios", "draw_engine"),
    "scheduler": ("avmp_vllm.plots.ratios", "draw_scheduler"),
    "prefix": ("avmp_vllm.plots.prefix", "draw"),
    "memory": ("avmp_vllm.plots.memory", "draw"),
    "predict": ("avmp_vllm.plots.predict", "draw"),
    "plan": ("avmp_vllm.plots.capacity", "draw"),
    "paper": ("avmp_vllm.plots.paper", "draw"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("result", type=Path, nargs="+", metavar="RESULT", help="result file(s)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the pictures (default: where the result is)",
    )
    parser.add_argument(
        "--only", metavar="NAME", help="draw only this picture of those that a result gives"
    )


def _benchmark(path: Path) -> str:
    """Which benchmark wrote a file; `results.read` then checks the rest.

    Raises:
        InputError: No benchmark whose results can be drawn did.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, None, f"cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise InputError(path, error.lineno, f"is not JSON: {error.msg}") from error
    name = content.get("benchmark") if isinstance(content, dict) else None
    if name not in PICTURES:
        known = ", ".join(PICTURES)
        raise InputError(path, None, f"holds no result that can be drawn ({known}), but {name!r}")
    return str(name)


def draw(path: Path) -> Mapping[str, Any]:
    """Figures of a result file by name.

    Raises:
        InputError: It is missing, garbled, or of something that has no picture.
    """
    name = _benchmark(path)
    result = results.read(path, name)
    module, function = PICTURES[name]
    picture: Callable[[Mapping[str, Any]], Mapping[str, Any]] = getattr(
        importlib.import_module(module), function
    )
    try:
        return picture(result)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        problem = f"is no whole result of {name}: {type(error).__name__}: {error}"
        raise InputError(path, None, problem) from error


def _run(args: argparse.Namespace) -> int:
    from avmp_vllm.plots.style import save

    for path in args.result:
        figures = draw(path)
        if args.only is not None and args.only not in figures:
            raise InputError(path, None, f"--only {args.only}: gives {', '.join(figures)}")
        for name, figure in figures.items():
            if args.only in (None, name):
                for written in save(figure, args.output or path.parent, name):
                    print(written)
    return 0


def run(args: argparse.Namespace) -> int:
    """Draw; 2 for a file that cannot be drawn."""
    try:
        return _run(args)
    except InputError as error:
        print(f"avmp plot: error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"avmp plot: error: {error}; pip install 'avmp-vllm[bench]'", file=sys.stderr)
        return 2
