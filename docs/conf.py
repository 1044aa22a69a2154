"""The site that `make docs` builds: README and the pages here, as they are, and API pages made from the docstrings."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from textwrap import indent
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent  # Sphinx reads from here, so that links between pages are those of the checkout
sys.path.insert(0, str(ROOT))

import fastmtl  # noqa: E402

project = "fastmtl"
version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]  # type: ignore[index]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**"]
exclude_patterns = [".*", "build", "dist", "demo-output", "docs/__pycache__"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = f"{project} {version}"
html_extra_path = ["index.html"]  # leads from the site's root to root_doc
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_show_copyright = False
html_copy_source = False
myst_heading_anchors = 4

default_role = "py:obj"  # `fastmtl.backward` in a docstring is a link, and a warning where it leads nowhere
nitpicky = True
nitpick_ignore_regex = [("py:(class|data|exc|meth)", ".*")]  # but types of torch and typing need not be links
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False


TITLES = ("Ways in", "Gradient methods", "Loss weightings", "What methods have in common", "Modules")
INTERNALS = ("checks", "diagnosis", "engine", "random", "sharded", "sparse")  # modules that docstrings point to
STANDALONE = ("compat",)  # modules that are imported by themselves


def public() -> dict[str, dict[str, Any]]:
    """What has a page of its own, by section and full name."""
    sections: dict[str, dict[str, Any]] = {title: {} for title in TITLES}
    for name in fastmtl.__all__:
        value = getattr(fastmtl, name)
        sections[_section(value)][f"fastmtl.{name}"] = value
    methods = [*sections["Gradient methods"].values(), *sections["Loss weightings"].values()]
    for base in {base for method in methods for base in method.__mro__} - set(methods):
        if base.__module__.startswith("fastmtl."):
            sections["What methods have in common"][f"{base.__module__}.{base.__name__}"] = base
    for name in (*INTERNALS, *STANDALONE):
        sections["Modules"][f"fastmtl.{name}"] = importlib.import_module(f"fastmtl.{name}")
    return sections


def _section(value: Any) -> str:
    if isinstance(value, ModuleType):
        return "Modules"
    if isinstance(value, type) and issubclass(value, fastmtl.GradientMethod):
        return "Gradient methods"
    if isinstance(value, type) and issubclass(value, fastmtl.LossWeighting):
        return "Loss weightings"
    return "Ways in"


def write_api(folder: Path) -> None:
    """A page for each, and one that lists them with the first lines of their docstrings."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.rst"):
        old.unlink()
    lists = []
    for title, entries in public().items():
        names = sorted(entries, key=str.lower)
        for name in names:
            kind = (
                "module"
                if isinstance(entries[name], ModuleType)
                else "class"
                if isinstance(entries[name], type)
                else "function"
            )
            _write(folder / f"{name}.rst", name.removeprefix("fastmtl."), f".. auto{kind}:: {name}")
        rows = "".join(f"* - `~{name}`\n  - {_first_line(entries[name])}\n" for name in names)
        pages = "".join(f"{name}\n" for name in names)
        table = f".. list-table::\n   :widths: 30 70\n\n{indent(rows, '   ')}"
        lists.append(f"{_heading(title, '-')}{table}\n.. toctree::\n   :hidden:\n\n{indent(pages, '   ')}")
    _write(folder / "index.rst", "API", "\n".join(lists))


def _first_line(value: Any) -> str:
    return re.sub("`+", "``", inspect.cleandoc(value.__doc__).splitlines()[0])


def _heading(title: str, line: str) -> str:
    return f"{title}\n{line * len(title)}\n\n"


def _write(path: Path, title: str, body: str) -> None:
    path.write_text(_heading(title, "=") + body + "\n", encoding="utf-8")


def find_by_short_name(app: Any, env: Any, node: Any, content: Any) -> Any:
    """What a docstring names without its module or class: a method that a class inherits, a base class."""
    if node.get("reftype") != "obj":
        return None
    python = env.get_domain("py")
    short = "." + node["reftarget"]
    found = [name for name, entry in python.objects.items() if name.endswith(short) and not entry.aliased]
    if len(found) != 1:
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, content)


def skip_pointers(app: Any, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Members whose docstring only points to the base class are not said again on every page."""
    return True if str(value.__doc__).startswith("See `") else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    write_api(ROOT / "docs" / "api")
    app.connect("missing-reference", find_by_short_name)
    app.connect("autodoc-skip-member", skip_pointers)
