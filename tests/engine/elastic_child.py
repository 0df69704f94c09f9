"""An engine over an elastic arena to which nothing is mapped; a program, since a fault ends it.

``python elastic_child.py MODEL``: only the start maps memory, plans do not. The process must die at
its first request.
"""

from __future__ import annotations

import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from enginelib import engine, greedy, mixed_prompts

from avmp_vllm.backing.elastic_buffer import ElasticBuffer

options = {"memory": "elastic", "chunk_bytes": 65536}
with engine(sys.argv[1], avmp=options) as llm:
    ElasticBuffer.map = lambda self, extents: None  # type: ignore[method-assign]
    ElasticBuffer.retire = lambda self, extents, fence: None  # type: ignore[method-assign]
    print("started", flush=True)
    greedy(llm, mixed_prompts(count=1), 4)
    print("answered")
