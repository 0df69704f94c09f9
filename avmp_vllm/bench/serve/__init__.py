"""``avmp bench serve``: two servers over HTTP, driven in turn with the same requests.

========== =================================================================================
rounds     what one round's requests came to: throughput, goodput, latencies
load       the two workloads: ``vllm bench serve`` on ShareGPT, and chats with their history
pair       both servers of a scenario, their counters and their processors' time
report     ratios with paired intervals, tables, targets
command    the command line, the journal, the result file
========== =================================================================================
"""
