"""``avmp bench serve``: servers over HTTP, driven in turn with the same requests.

========== =================================================================================
rounds     what one round's requests came to: throughput, goodput, latencies
chats      conversations whose prompts hold the answers that the server gave
load       the two workloads: ``vllm bench serve`` on ShareGPT, and chats
models     the tiny Jambas that are served when no model is named
sides      the servers of a scenario, their counters and their processors' time
job        a run: every scenario, round by round
report     ratios to stock's best with paired intervals, tables, targets, parity
command    the command line, the journal, the result file
========== =================================================================================
"""
