"""How `make docs` builds the site: Markdown through MyST; the reference pages are made by make_reference.py."""

project = "opsig"
html_title = "opsig"
extensions = ["myst_parser"]
html_theme = "furo"
exclude_patterns = ["README.md", "_site"]
myst_heading_anchors = 3
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
suppress_warnings = ["misc.highlighting_failure"]  # `sh gpu` blocks of paper.md
