"""``avmp bench engine``: whole engines, stepped in their own processes, in turn.

========== =================================================================================
workloads  what is driven: decodes, a prefill, more requests than fit
weights    random weights for a model that is only a config
child      one engine behind a pipe: the program of a child process
process    the parent's end of that pipe
rounds     one workload over several engines: slices in turn, figures, tokens compared
report     ratios with paired intervals, tables, targets
command    the command line, the journal, the result file
========== =================================================================================
"""
