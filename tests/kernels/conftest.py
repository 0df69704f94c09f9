"""The kernels' tests run in two ways.

`interpreted/` needs TRITON_INTERPRET=1 before triton is imported, which would change every other
test of the process, so `test_kernels_interpreter.py` runs that folder in a process of its own.
"""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
