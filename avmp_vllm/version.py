"""The one place where versions are declared."""

__version__ = "0.1.0"

#: The vLLM minor release this plugin is written against. A different one is refused at start-up.
SUPPORTED_VLLM = "0.32"
