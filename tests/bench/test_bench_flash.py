"""FlashAttention in `avmp bench kernels`, up to its launch, which needs a GPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from avmp_kernels import workloads
from avmp_kernels.measure import Limits, Time
from avmp_kernels.reference import kv as reference

from avmp_vllm.bench import kernels, stock_kernels

LIMITS = Limits(copy=1e9, matrix=1e12)


def _attending(page_tokens=32, queries=(1, 1)):
    return workloads.attending(
        [70, 33], list(queries), page_tokens, torch.device("cpu"), heads=(4, 2), head_size=64,
        dtype=torch.float32,
    )  # fmt: skip


def _reference(q, k, v, table, given):
    out = torch.empty_like(q)
    names = ("seq_lens", "query_start_loc", "scale")
    reference.paged_attention(out, q, k, v, table, *(given[n] for n in names))
    return out


@pytest.fixture
def calls(monkeypatch):
    """A FlashAttention that is the reference, and what it was called with."""
    seen: list[dict] = []

    def attend(**call):
        given = {"seq_lens": call["seqused_k"], "query_start_loc": call["cu_seqlens_q"]}
        given["scale"] = call["softmax_scale"]
        call["out"].copy_(_reference(call["q"], call["k"], call["v"], call["block_table"], given))
        seen.append(call)

    def plan(**call):
        seen.append(call)
        return "the schedule"

    package, interface = ModuleType("vllm.vllm_flash_attn"), ModuleType("interface")
    interface.flash_attn_varlen_func, interface.get_scheduler_metadata = attend, plan
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, f"{package.__name__}.flash_attn_interface", interface)

    def triton(given):
        return lambda: _reference(
            given["query"], given["key_cache"], given["value_cache"], given["table"], given
        )

    monkeypatch.setattr(stock_kernels, "attention", triton)
    monkeypatch.setitem(stock_kernels.STOCK, "attention", triton)
    from vllm.v1.attention.backends import fa_utils

    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **shape: 3)
    monkeypatch.setattr(kernels, "time_launch", lambda launch, ms: _timed(launch))
    return seen


def _timed(launch):
    launch()
    return Time(2e-6, 2e-6, 2e-6)


def test_it_reads_avmp_s_strided_views(calls, capsys):
    """Pages of several layers apart, physical indices; a column of its own."""
    work = _attending()
    quick = workloads.Workload(
        work.name, lambda: None, moved=1, inputs=work.inputs, stock=work.stock
    )
    (row,) = kernels.time_all(iter([lambda: quick]), "", LIMITS, (), 1)
    assert kernels._cells(row)[-2:] == ["1.000", "1.000"]
    plan, *launches = calls
    assert (plan["page_size"], plan["num_heads_kv"], plan["num_splits"]) == (32, 2, 32)
    call = launches[0]
    keys = call["k"]
    assert keys.shape[1:] == (32, 2, 64)
    assert keys.stride(0) > 32 * 2 * 2 * 64  # pages of other layers lie between
    assert call["block_table"] is work.inputs["table"]
    assert (call["scheduler_metadata"], call["fa_version"]) == ("the schedule", 3)


def test_a_prefill_has_no_bound_on_splits(calls):
    """vLLM bounds them only for batches that a CUDA graph may hold."""
    stock_kernels.flash_attention(_attending(queries=(70, 33)).inputs)
    assert calls[0]["num_splits"] == 32
    calls.clear()
    inputs = _attending().inputs
    longer = inputs["query"].expand(1 + stock_kernels.LARGEST_GRAPH, -1, -1, -1).flatten(0, 1)
    stock_kernels.flash_attention(inputs | {"query": longer})
    assert calls[0]["num_splits"] == 0


def test_other_results_are_an_error_in_its_column_only(calls, monkeypatch):
    """A kernel that took the strides for others would be fast and wrong."""
    monkeypatch.setattr(
        stock_kernels, "attention", lambda given: lambda: torch.zeros_like(given["query"])
    )
    work = _attending()
    quick = workloads.Workload("a", lambda: None, moved=1, inputs=work.inputs, stock=work.stock)
    (row,) = kernels.time_all(iter([lambda: quick]), "", LIMITS, (), 1)
    assert "other results than the Triton backend's" in row["flash_error"]
    assert kernels._cells(row)[-2:] == ["1.000", "error"]


def test_what_is_absent_is_said(monkeypatch):
    """Here: a vLLM without CUDA. There: one whose FlashAttention cannot be imported."""
    assert kernels.left_out(True) == {"stock": "as asked", "flash": "as asked"}
    assert "not its CUDA build" in kernels.left_out(False)["flash"]
    monkeypatch.setattr(stock_kernels, "available", lambda: None)
    found = kernels.left_out(False)
    assert list(found) == ["flash"]
    assert "FlashAttention cannot be used: ImportError" in found["flash"]


def test_a_column_that_is_left_out_is_not_run(monkeypatch):
    monkeypatch.setattr(kernels, "time_launch", lambda launch, ms: _timed(launch))
    work = _attending()
    quick = workloads.Workload("a", lambda: None, moved=1, inputs=work.inputs, stock=work.stock)
    (row,) = kernels.time_all(iter([lambda: quick]), "", LIMITS, ("stock", "flash"), 1)
    assert kernels._cells(row)[-2:] == ["-", "-"]
    assert not [key for key in row if "error" in key]
