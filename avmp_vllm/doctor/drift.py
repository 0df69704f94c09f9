"""Whether a vLLM is one that AVMP was written for.

The drift tests and ``avmp doctor`` ask the same questions, of the same tables. vLLM is read and not
imported, so that the tests can ask them of a release that is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avmp_vllm.doctor.overridden import OVERRIDDEN
from avmp_vllm.doctor.source import Function, Gone, SourceTree, parameters

if TYPE_CHECKING:
    from avmp_vllm.engine.entry.seams import Seam


def drift(function: Function, expected: tuple[str, ...]) -> str:
    """How a function's parameters differ from those relied on; empty if they do not."""
    found = parameters(function)
    by_place = expected[: expected.index("*")] if "*" in expected else expected
    by_name = expected[len(by_place) + 1 :]
    if found[: len(by_place)] == by_place and set(by_name) <= set(found):
        return ""
    return f"takes ({', '.join(found)}) and not ({', '.join(expected)}, ...)"


def all_seams(minor: str) -> tuple[Seam, ...]:
    """Every seam that a minor release of vLLM has."""
    from avmp_vllm.engine.entry import seams

    return seams.of(
        (*seams.SELECTION, *seams.ENGINE, *seams.API, *seams.RUNNER_V1, *seams.RUNNER_V2), minor
    )


def relied_on(minor: str) -> dict[str, tuple[str, ...]]:
    """Every function of vLLM that AVMP wraps, overrides or calls, and the parameters relied on."""
    wrapped = {f"{seam.module}:{seam.path}": seam.signature for seam in all_seams(minor)}
    return wrapped | OVERRIDDEN


def drifted(tree: SourceTree, minor: str) -> list[str]:
    """A line for each function that AVMP relies on and that is not as expected.

    Args:
        tree: vLLM's source.
        minor: Its minor release.
    """
    lines = []
    for where, expected in relied_on(minor).items():
        try:
            node = tree.find(where).node
        except Gone as error:
            lines.append(f"{where} is gone ({error})")
            continue
        if not isinstance(node, Function):
            lines.append(f"{where} is no function any more")
        elif problem := drift(node, expected):
            lines.append(f"{where} {problem}")
    return lines
