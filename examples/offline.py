"""Generate text in process, with AVMP in charge of the cache.

python examples/offline.py                                    # a tiny random Jamba, any machine
python examples/offline.py ai21labs/AI21-Jamba-Reasoning-3B   # a real one, on a GPU
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from vllm import LLM, SamplingParams

from avmp_vllm.models.tiny_jamba import write_tiny_jamba

PROMPTS = [
    "The difference between a page and a block is",
    "Write a letter to my teacher:",
    "Which city should I visit in the summer?",
]


def main() -> None:
    options: dict[str, Any] = {"additional_config": {"block_manager": "avmp"}}
    if len(sys.argv) > 1:
        model = sys.argv[1]
    else:
        model = str(write_tiny_jamba(tempfile.mkdtemp(prefix="tiny-jamba-")))
        # A small model on a small machine; a real one needs none of these.
        options |= {
            "dtype": "float32",
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 4 * 2**20,
            "enforce_eager": True,
        }
    llm = LLM(model, **options)
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32)):
        print(f"{output.prompt!r}\n    {output.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
