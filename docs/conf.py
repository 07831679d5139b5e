"""The site: `make docs` builds it, and takes every warning for an error."""

import importlib.metadata
import importlib.util

project = "p4flows"
author = "the p4flows authors"
release = importlib.metadata.version("p4flows")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_heading_anchors = 3
napoleon_use_ivar = True
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, shapes and units
# Hosts that are not installed where the site is built; their pages are built all the same.
autodoc_mock_imports = [
    name
    for name in ("bgflow", "zuko", "FrEIA", "nessai", "openmm", "openmmtools", "mdtraj")
    if importlib.util.find_spec(name) is None
]

html_theme = "furo"
html_title = "p4flows"
html_show_sphinx = False
html_copy_source = False
