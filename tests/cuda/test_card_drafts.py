"""Drafters with attention of their own on a card: tokens, drafts and acceptance, pages moving."""

from __future__ import annotations

import pytest
from drafting import FIGURES, METHODS, Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Engines of this module, in bf16: the schedule is the same, and so are the batches.

    Gated delta nets by Triton, since vLLM's choice on Hopper needs FlashInfer. Drafts pass the
    scheduler, where they are noted, without asynchronous scheduling alone.
    """
    options = {"gdn_prefill_backend": "triton", "async_scheduling": False}
    return Runs(tmp_path_factory.mktemp("drafts"), **options)


@pytest.mark.parametrize("method", METHODS)
def test_drafts_equal_stock(runs, method):
    """While all free capacity goes to and fro between the pools."""
    stock, avmp = runs(method, "stock"), runs(method, "moving")
    for what in FIGURES:
        assert avmp[what] == stock[what], what
    assert 0 < stock["accepted"] < stock["drafted"]
    assert min(avmp["did"].migrations.values()) > 20
