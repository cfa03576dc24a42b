"""How Sphinx builds the documentation: ``make docs``."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from latex2mathml.converter import convert

import lightning_genmodels

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import model_pages  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

os.environ["PYTHONPATH"] = str(HERE)  # the pages draw with pages.py
os.environ["OMP_NUM_THREADS"] = "1"  # pages are executed beside each other
os.environ["LIGHTNING_GENMODELS_DATA"] = str(HERE / "_build" / "data")  # the pages get by without downloads


def fingerprint() -> str:
    """Of what the cells' outputs depend on beside the cells: the package, its weights, and what draws."""
    digest = hashlib.sha256((HERE / "pages.py").read_bytes())
    package = Path(lightning_genmodels.__file__).parent
    for file in sorted([*package.rglob("*.py"), *package.rglob("*.json")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


project = "lightning_genmodels"
copyright = "the authors of lightning_genmodels, Apache-2.0"  # noqa: A001
release = lightning_genmodels.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

myst_enable_extensions = ["dollarmath", "attrs_inline", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "cells" / fingerprint())  # outputs, by the content of their cells
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = "lightning_genmodels"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sphinx = False
html_theme_options: dict[str, Any] = {
    "source_repository": "https://github.com/lightning-genmodels/lightning-genmodels/",
    "source_branch": "main",
    "source_directory": "docs/",
}
pygments_style = "friendly"


def visit_math(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Formulas are MathML, which browsers draw without a script."""
    if isinstance(node, nodes.math_block):
        self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    else:
        self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    model_pages.write()
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))


html_math_renderer = "mathml"
