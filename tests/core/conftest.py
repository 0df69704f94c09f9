"""How long the long runs are."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--operations``."""
    parser.addoption(
        "--operations",
        type=int,
        default=20_000,
        help="operations on the core with changing budgets (20000; the long run: 100000)",
    )
