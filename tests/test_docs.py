"""The pages are all in the table of contents; what they and the docstrings link to is there. (All of it: make docs.)"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_every_page_is_in_the_table_of_contents_and_listed() -> None:
    index = ROOT / "docs" / "index.md"
    _, _, contents = index.read_text().partition("```{toctree}\n")
    entries = re.findall(r"([^\s<>]+)>?$", contents.partition("```")[0], re.MULTILINE)
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages | {"api/index"} == {entry for entry in entries if not entry.startswith((":", "../"))}
    assert pages <= {Path(link).stem for link in LINK.findall(prose(index))}


def documented(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Full names and docstrings of what a page of the API shows."""
    text = inspect.getdoc(value) or ""
    yield name, text
    _, _, attributes = text.partition("\nAttributes:\n")
    for attribute in re.findall(r"^    (\w+): ", re.split(r"^\S", attributes, flags=re.MULTILINE)[0], re.MULTILINE):
        yield f"{name}.{attribute}", ""
    if isinstance(value, ModuleType):
        own = {key: x for key, x in vars(value).items() if getattr(x, "__module__", None) == value.__name__}
        for constant in re.findall(r'^(\w+)\b.* = .*\n"""', inspect.getsource(value), re.MULTILINE):
            yield f"{name}.{constant}", ""
    else:
        own = dict(vars(value)) if isinstance(value, type) else {}
    for key, member in own.items():
        if not key.startswith("_") and (isinstance(member, type | property) or callable(member)) and member.__doc__:
            yield from documented(f"{name}.{key}", member)


def test_references_in_docstrings() -> None:
    """Names in single backticks are links: in full, or the end of one full name."""
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    entries = {name: x for section in conf.public().values() for name, x in section.items()}
    shown = dict(pair for name, x in entries.items() for pair in documented(name, x))
    ends = {name[i:] for name in shown for i in (m.end() for m in re.finditer(r"^|\.", name))}
    for name, text in shown.items():
        for target in re.findall(r"(?<![`:\w])`([\w.]+)`(?!`)", text):
            assert target in ends, f"{name}: `{target}` is nothing that the API shows; write ``{target}``"
