"""How Sphinx builds the reference pages from the docstrings: make docs."""

import inception_jax

project = "inception_jax"
copyright = "the authors of inception_jax"
release = inception_jax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",  # Docstrings in Google's style.
    "sphinx.ext.viewcode",
]
templates_path = ["templates"]
# `x` in the docstrings is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autosummary_generate = True
autosummary_imported_members = False
napoleon_numpy_docstring = False
# Attributes as a part of the class's text: as members they would be described twice.
napoleon_use_ivar = True
# `x` in a type may be an attribute of several classes.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = f"inception_jax {release}"
