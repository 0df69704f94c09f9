"""Entry point of the group ``vllm.general_plugins``, which vLLM calls in all its processes."""

from __future__ import annotations

import os

from avmp_vllm.engine.cpu import mamba as cpu_mamba
from avmp_vllm.engine.entry import seams
from avmp_vllm.engine.entry.config import SELECTED


def register() -> None:
    """Offer ``--block-manager``, and where AVMP is already selected, put it in charge."""
    seams.install(seams.SELECTION)
    cpu_mamba.register()
    if os.environ.get(SELECTED):
        seams.install(seams.ENGINE)
