"""The site: Sphinx reads the Markdown files in here, and what `computed.py` makes of the code."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import computed  # noqa: E402
import pictures  # noqa: E402

import functional_sgd  # noqa: E402

project = "functional_sgd and loop"
copyright = "the functional_sgd developers"
version = release = functional_sgd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["build", "generated/from_*.md"]  # tables that pages include
nitpicky = False
maximum_signature_line_length = 80

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # annotations stand in the source; a signature with them is unreadable
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "functional_sgd and loop"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = False  # generated/api/index.md is the index
html_show_sphinx = False

computed.write_pages(HERE / "generated")
pictures.draw_all(HERE / "generated")


def setup(app: object) -> None:
    app.connect("autodoc-process-docstring", computed.as_restructured_text)
    app.connect("source-read", computed.point_outside)
