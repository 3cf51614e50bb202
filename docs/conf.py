"""The site that `make docs` builds: the pages as they stand in the repository, and docs/api.rst out of the docstrings.

The repository's root is the source folder (`sphinx-build -c docs . out/docs`), so that a link between two pages leads
somewhere on the site as in the repository. Nothing is fetched.
"""

from typing import Any

import fastrnn

CONTENTS = {
    "Use": ["docs/recipes", "docs/existing-models", "docs/examples", "docs/api"],
    "Facts": ["docs/support", "docs/measured", "docs/performance-cpu", "benchmarks/README"],
    "Inside": ["docs/architecture", "docs/gpu", "CONTRIBUTING", "CHANGELOG"],
}

project = "fastrnn"
release = fastrnn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
nitpicky = True  # a name that leads nowhere is a warning; a default stands where others have a type
nitpick_ignore_regex = [("py:class", "default .*")]
include_patterns = ["README.md", *(f"{page}.*" for pages in CONTENTS.values() for page in pages)]
highlight_language = "none"  # a block that names no language is a command or a drawing
myst_heading_anchors = 3
smartquotes_action = "D"  # dashes alone: most quotes here are those of code

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_custom_sections = [
    ("Keyword arguments that torch lacks", "params_style"),
    ("Arguments of a call", "params_style"),
]
maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"fastrnn {release}"
html_static_path = html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False  # the footer would name nobody
pygments_dark_style = "github-dark"  # the theme's own underlines what is imported, as if it were a link


def front_page(app: Any, page: str, text: list[str]) -> None:
    """README.md names the other pages in its sentences; the table of contents beside every page is made here."""
    if page == root_doc:
        for title, pages in CONTENTS.items():
            listed = "\n".join(f"/{page}" for page in pages)
            text[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{listed}\n```\n"


def setup(app: Any) -> None:
    app.connect("source-read", front_page)
