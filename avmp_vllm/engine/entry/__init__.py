"""How AVMP gets into vLLM, in every process of it.

========= ==========================================================================
plugin    entry point: what is registered when vLLM loads its plugins
seams     the table of every place where vLLM is changed, and its installation
flag      ``--block-manager`` on the command line
config    the options under ``additional_config["avmp"]``
memory_api an endpoint that shows and sets the budget of an elastic arena
sizes     bytes as a user writes them
selection what happens when a configuration asks for AVMP: classes are named
options   vLLM options that AVMP refuses
connectors KV connectors that work, and what of them does not
minors    what differs between the minor releases of vLLM that AVMP serves
last_line a refusal is the last line that the user of a command line reads
========= ==========================================================================
"""
