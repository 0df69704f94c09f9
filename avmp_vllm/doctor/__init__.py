"""``avmp doctor``: is this machine, and is this command line, ready for AVMP?

============= ======================================================================
check         one line of the report
installation  versions, platform, plugin, seams, Triton, environment
drift         whether the installed vLLM is the one that the seams were written for
triton_probe  a program of its own that runs one small Triton kernel
serve_line    a ``vllm serve`` command line: everything AVMP refuses, at once
fit           what fits into the memory of that command line
command       the command
============= ======================================================================

Nothing here imports vLLM, torch or pydantic at the top of a file: the command must work, and say
what is missing, where they are not installed.
"""
