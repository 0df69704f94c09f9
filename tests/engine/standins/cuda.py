"""What Kimi-Linear's module asks of CUDA as it is built, and its layers then do not use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm.models.kimi_k3.nvidia import model


def with_a_stream(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap the model's constructor. No longer than that: Runner V2 brings a stream of its own."""

    def init(self: Any, **kwargs: Any) -> None:
        with mock.patch.object(torch.cuda, "Stream", SimpleNamespace):
            stock(self, **kwargs)

    return init


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """A stream for the output gate, and a fused GEMM over ranks."""
    init = with_a_stream(model.KimiLinearModel.__init__)
    with (
        mock.patch.object(model.KimiLinearModel, "__init__", init),
        mock.patch.object(model, "maybe_init_gemm_rs_ar", return_value=False),
    ):
        yield
