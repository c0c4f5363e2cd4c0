"""Builds the reference from the docstrings: `make docs`."""

from importlib.metadata import version as version_of

project = "sparda_compile"
author = "The sparda_compile authors"
version = release = version_of("sparda-compile")
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "alabaster"
html_theme_options = {"description": "Long contexts on one GPU", "page_width": "1100px"}
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
# Docstrings are Google's, with one attribute a line, and read as Markdown: `code` is code.
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "code"
# What names a class of torch or of transformers leads nowhere from here.
nitpicky = False


def literal_tables(app, what, name, obj, options, lines):
    """Keep the lines of a module's small tables and drawings: indented blocks stay as they are."""
    if what != "module":
        return
    shown = []
    for line in lines:
        begins = line.startswith("    ") and (not shown or not shown[-1].strip())
        # A block with an empty line in it goes on.
        inside = next((x for x in reversed(shown) if x.strip()), "").startswith("    ")
        if begins and not inside:
            shown += ["::", ""]
        shown.append(line)
    lines[:] = shown


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", literal_tables)
