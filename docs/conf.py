"""The documentation's settings: python -m sphinx -W --keep-going docs site, from the repository's root."""

import runpy
from pathlib import Path

VERSIONS = runpy.run_path(str(Path(__file__).parents[1] / "mixlora_kernels" / "versions.py"))

project = "mixlora_kernels"
version = release = VERSIONS["__version__"]
language = "en"
html_theme = "furo"
html_title = f"mixlora_kernels {release}"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# Pages are Markdown, and a link is checked down to its heading. A link that leads nowhere is a warning, and a warning
# is an error in CI.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]
# tests/test_notebook.py runs the notebook and compares what it prints with the output that is kept in it.
nb_execution_mode = "off"

# Docstrings write names in double backticks, and a comma-separated list of arguments may share one description.
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
