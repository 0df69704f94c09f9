"""What Kimi-Linear's module asks of CUDA as it is built, and its layers then do not use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from vllm.models.kimi_k3.nvidia import model


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """A stream for the output gate, and a fused GEMM over ranks."""
    with (
        mock.patch.object(torch.cuda, "Stream", SimpleNamespace),
        mock.patch.object(model, "maybe_init_gemm_rs_ar", return_value=False),
    ):
        yield
