"""The tiny Jambas that are served when ``--model`` names none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: States of 114 KiB, which stock vLLM pads more than threefold.
PADDED = "padded"
#: The proportions of Jamba Reasoning 3B with fp32 states, at a little over half its size.
JAMBA = "jamba"

#: Name -> fields of ``JambaConfig`` beside those of ``avmp tiny-jamba``.
#:
#: ============================== ================== ==================
#: in tokens of KV                ``jamba``          Jamba Reasoning 3B
#: ============================== ================== ==================
#: stock's block on its platform  384, padded by 3%  704, padded by 1%
#: one request's states           4,836              9,100
#: Mamba layers to attention      13                 13
#: ============================== ================== ==================
SHAPES: dict[str, dict[str, Any]] = {
    PADDED: {},
    JAMBA: {
        "num_hidden_layers": 14,
        "attn_layer_period": 14,
        "attn_layer_offset": 7,
        "num_key_value_heads": 1,
        "mamba_d_state": 90,
        "num_experts": 1,
        "num_experts_per_tok": 1,
    },
}


def write_model(folder: Path, shape: str) -> Path:
    """Write the checkpoint of a shape below a folder; return it."""
    # Imported here: torch and transformers take seconds, and a help text needs neither.
    from transformers.utils import logging

    from avmp_vllm.models.tiny_jamba import write_tiny_jamba

    logging.disable_progress_bar()
    return write_tiny_jamba(folder / f"tiny-jamba-{shape}", **SHAPES[shape])
