"""The site: ``sphinx-build -W -n --keep-going docs build/site``."""

from __future__ import annotations

import os
import re
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

# The interpreted engine has plain Python functions, whose signatures autodoc can read.
os.environ["SHMCACHE_ENGINE"] = "interpreted"

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

project = "shmcache"
author = "shmcache contributors"
copyright = "shmcache contributors"  # noqa: A001 - Sphinx's name for it
version = release = installed("shmcache")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
highlight_language = "none"  # blocks without a language are drawings and output

# --- pages ------------------------------------------------------------------------

myst_heading_anchors = 3  # links to headings work as they do on GitHub

# These pages of the site are files that stand elsewhere in the repository.  Here stands
# only a page that leads to each, for readers on GitHub.
ELSEWHERE = {
    "changelog": "CHANGELOG.md",
    "conduct": "CODE_OF_CONDUCT.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
    "tests": "tests/README.md",
}

# --- reference ----------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # the attributes of dataclasses have their own entries

nitpick_ignore_regex = [
    # The types of Python and of other packages: the site is built without a network,
    # so their inventories cannot be asked.  Names of shmcache itself are checked.
    ("py:.*", r"(?!shmcache\.).*"),
]

# --- look -----------------------------------------------------------------------------

html_theme = "furo"
html_title = f"shmcache {release}"
html_copy_source = False
html_show_sphinx = False


def _read(app: Any, page: str, source: list[str]) -> None:
    """Take a page's text from where it stands; lead its links to pages of the site."""
    path = DOCS / f"{page}.md"
    if page in ELSEWHERE:
        path = ROOT / ELSEWHERE[page]
        app.env.note_dependency(str(path))
        source[0] = path.read_text(encoding="utf-8")
    pages = {ROOT / file: f"{page}.md" for page, file in ELSEWHERE.items()}

    def link(found: re.Match[str]) -> str:
        target = (path.parent / found[1]).resolve()
        return f"]({pages.get(target) or os.path.relpath(target, DOCS)}"

    source[0] = re.sub(r"\]\(([\w./-]+\.(?:md|svg))", link, source[0])


def setup(app: Any) -> None:
    """Register what this file adds to Sphinx."""
    app.connect("source-read", _read)
