"""The documentation site: ``make docs``, or ``sphinx-build -W -n -c docs . build/docs``.

The source folder is the whole repository, so that a link between two of its Markdown files works
alike in an editor, in a repository browser and on the site. Every broken link is a warning, and
``-W`` makes a warning an error.
"""

from __future__ import annotations

from avmp_vllm.version import SUPPORTED_VLLM, __version__

project = "AVMP for vLLM"
author = "the AVMP authors"
copyright = f"{author}. Apache 2.0"
version = release = __version__

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "avmp_vllm/bench/README.md",
    "avmp_vllm/bench/*/README.md",
    "kernels/README.md",
]

# Links to headings, `file.md#a-heading`, are checked as well.
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"AVMP {__version__} for vLLM {' and '.join(SUPPORTED_VLLM)}"
html_show_sphinx = False
html_copy_source = False
