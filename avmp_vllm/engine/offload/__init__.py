"""Native offloading to the host: vLLM's ``OffloadingConnector`` over an arena.

========= ==========================================================================
connector what vLLM's factory makes in each process, in place of its own connector
view      the cache's configuration as the connector's code reads it
fence     scheduler: which transfers must end before a step's plan touches their bytes
resolve   worker: handles become places when a transfer is submitted
host      pages and states in the host's memory: what ``--kv-offloading-size`` asks for
copies    worker: copies between an arena and the host's rows
========= ==========================================================================

The connector's two halves run in different processes, and vLLM's own code is in one class for both;
so is this, on a floor of its own.
"""
