"""Sphinx's settings: the Markdown pages of this folder and the generated reference, as a site that opens offline.

Read by `sphinx-build`, which `make docs` runs with warnings as errors; the reference is written just before. Pages stay
plain Markdown that reads well without Sphinx; what only the site needs is done here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

import mist

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from generate import SOURCE_LINK, write_reference  # noqa: E402

project = "MIST"
version = release = mist.__version__
project_copyright = "the authors of MIST; Apache-2.0"

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
smartquotes = False  # `--set` and quotes are meant as they are
myst_heading_anchors = 4  # the anchors that forges give to headings
exclude_patterns = ["Thumbs.db", ".DS_Store"]

html_theme = "furo"
html_title = f"MIST {version}"
html_static_path = ["site.css", "site.js"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_show_sourcelink = False
html_show_search_summary = False  # would be fetched, which browsers refuse to pages that are files
html_copy_source = False
maximum_signature_line_length = 90
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True

#: a block whose first line says, for the tests that execute it, in which file it goes
NAMED_BLOCK = re.compile(r"^<!-- file: (\S+) -->\n```(\w+)\n", re.MULTILINE)


def dress(app: Sphinx, page: str, content: list[str]) -> None:
    """Show the file's name over a block, which plain Markdown keeps in a comment, and source files as pages."""
    content[0] = NAMED_BLOCK.sub(r"```{code-block} \2\n:caption: \1\n\n", content[0])
    content[0] = SOURCE_LINK.sub(r"](reference/source/\1.md)", content[0])


def setup(app: Sphinx) -> None:
    """Write the reference, and register what Sphinx lacks."""
    write_reference(HERE / "reference")
    app.add_lexer("csv", TextLexer)
    app.connect("source-read", dress)
