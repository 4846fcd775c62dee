"""Sphinx configuration; `make docs` builds the pages into build/docs."""

import json
import os
import pathlib
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import inception_jax

project = "inception_jax"
copyright = "the authors of inception_jax"
release = inception_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",  # Docstrings in Google style.
    "sphinx.ext.viewcode",
]
templates_path = ["templates"]
exclude_patterns = ["templates", "**/.ipynb_checkpoints"]
# Headings get the anchors that GitHub gives them.
myst_heading_anchors = 4
# `x` in the docstrings is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autosummary_generate = True
autosummary_imported_members = False
napoleon_numpy_docstring = False
# Attributes become part of the class's text; as members they would be described twice.
napoleon_use_ivar = True
suppress_warnings = [
    "ref.python",  # `x` in a type may be an attribute of several classes.
    "misc.highlighting_failure",  # Console output in a notebook is not a language.
]

html_theme = "furo"
html_title = f"inception_jax {release}"


class NotebookParser(MystParser):
    """Renders a notebook with the outputs stored in it; nothing is executed."""

    supported = ("ipynb",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parses the notebook's JSON as the Markdown page that it amounts to."""
        cells = json.loads(inputstring)["cells"]
        super().parse("\n\n".join(map(_cell_as_markdown, cells)) + "\n", document)


def _cell_as_markdown(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return source
    parts = [_fenced(source, "python")] if source.strip() else []
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if "image/png" in data:
            parts.append(f"![Output](data:image/png;base64,{_joined(data['image/png'])})")
        elif text := output.get("text") or data.get("text/plain"):
            parts.append(_fenced("".join(text).rstrip("\n"), "text"))
    return "\n\n".join(parts)


def _fenced(text: str, language: str) -> str:
    return f"``````{language}\n{text}\n``````"


def _joined(base64: str | list[str]) -> str:
    return "".join("".join(base64).split())


class LinkOutside(SphinxTransform):
    """Turns links that lead out of docs/ into downloads, or for a folder into plain text.

    MyST takes any Markdown file, such as results/tiny_cpu/README.md, for a page of the site.
    """

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Replaces the links of one page."""
        here = pathlib.Path(self.env.doc2path(self.env.docname)).parent
        for link in list(self.document.findall(addnodes.pending_xref)):
            target = link["reftarget"]
            if link.get("refdomain") == "doc" and target not in self.env.found_docs:
                relative = os.path.relpath(self.env.srcdir / f"{target}.md", here)
                link.replace_self(
                    addnodes.download_reference(
                        "", "", *link.children, reftarget=relative, refdoc=self.env.docname
                    )
                )
            elif link.get("reftype") == "myst" and (here / target).is_dir():
                link.replace_self(link.children)


def setup(app: Sphinx) -> None:
    """Adds what the pages need in addition to the extensions."""
    app.add_source_suffix(".ipynb", "ipynb")
    app.add_source_parser(NotebookParser)
    app.add_transform(LinkOutside)
