"""The one place where versions are declared."""

__version__ = "0.1.0"

#: The vLLM minor releases this plugin is written against, the oldest first. What differs between
#: them is in ``engine/entry/minors.py``. Any other is refused at start-up.
SUPPORTED_VLLM = ("0.32", "0.33")

#: The same for a reader.
SUPPORTED_VLLM_TEXT = " or ".join(f"{minor}.x" for minor in SUPPORTED_VLLM)


def minor_of(version: str) -> str:
    """The minor release of a version, ``0.32`` of ``0.32.1+cpu``."""
    return ".".join(version.split("+")[0].split(".")[:2])
