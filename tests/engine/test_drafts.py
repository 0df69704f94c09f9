"""Speculative decoding by a drafter with attention of its own: tokens, drafts and acceptance.

Three drafters: the model's own layer (MTP), EAGLE and EAGLE-3. A wrong draft changes no token: it
is rejected, and the answer only takes longer. So the drafts are compared, each by what its request
had so far. Without a prefix cache: with one, vLLM copies the states of drafting requests by a
kernel that its CPU build lacks. Drafts by ngram, with a prefix cache, are in ``test_runner_v2.py``.
"""

from __future__ import annotations

import pytest
from drafting import DRAFTED, FIGURES, MEMORY, METHODS, Runs

from avmp_vllm.models.drafts import Drafts
from avmp_vllm.models.shapes import read_shape
from avmp_vllm.planner.plan import Plan, make_plan


def plan_of(runs: Runs, method: str) -> Plan:
    """What `avmp plan` says of the same."""
    shape = read_shape(runs.model)
    return make_plan(
        shape.with_state_dtype(runs(method, "stock")["state_dtype"]),
        MEMORY,
        backend="CPU_ATTN",
        prefix_caching=False,
        max_model_len=512,
        drafts=Drafts(DRAFTED, method, runs.drafters.get(method)),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Engines of this module."""
    return Runs(tmp_path_factory.mktemp("drafts"))


@pytest.mark.parametrize(
    ("method", "way"),
    [("mtp", "still"), ("mtp", "moving"), ("eagle", "moving"), ("eagle3", "moving")],
)
def test_drafts_equal_stock(runs, method, way):
    """Tokens, every draft, and what became of it."""
    stock, avmp = runs(method, "stock"), runs(method, way)
    for what in FIGURES:
        assert avmp[what] == stock[what], what
    assert sum(min(draft) >= 0 for draft in stock["drafts"].values()) > 100
    assert 0 < stock["accepted"] < stock["drafted"]
    if way == "moving":
        assert min(avmp["did"].migrations.values()) > 20
        assert sum(avmp["did"].relocations.values()) > 20


def test_control_rows_not_resolved_change_drafts(runs):
    """Table entries that stay as they were: the drafter reads pages that have moved."""
    assert runs("mtp", "stale")["drafts"] != runs("mtp", "stock")["drafts"]


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_counts_what_drafts_hold(runs, method):
    """`avmp plan`, the engine's capacity block and stock vLLM's own figures agree."""
    plan, avmp = plan_of(runs, method), runs(method, "moving")
    assert avmp["geometry"] == plan.geometry
    assert avmp["states"] == plan.states == 1 + DRAFTED
    assert runs(method, "stock")["blocks"] == plan.stock.blocks + 1
    fit = plan.sequences(512)
    row = f"{512:>13,} {fit['AVMP']:>10,} {fit['AVMP'] * 512:>12,} {fit['stock']:>11,}"
    assert row in avmp["capacity"]
