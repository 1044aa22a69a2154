"""Every Python block of the README, of CONTRIBUTING and of docs/ runs, in order; so does every docstring's example.

A block that begins with "```python NAME" runs where the package NAME is installed; one that begins with "```py" is
somebody else's code and does not run. Examples of fastmtl.integrations: tests/integrations/test_documentation.py.
"""

import doctest
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import fastmtl

ROOT = Path(__file__).parent.parent


BLOCK = re.compile(r"^```python(?: (\w+))?\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(file.relative_to(ROOT)): blocks for file in FILES if (blocks := BLOCK.findall(file.read_text()))}


def run_blocks(page: str) -> None:
    namespace: dict = {"__name__": "page"}
    for package, block in PAGES[page]:
        if not package or importlib.util.find_spec(package):
            exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def test_readme_values() -> None:
    # The values that the README's comments promise.
    import torch

    jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    out = fastmtl.aggregate(jacobian, fastmtl.MGDA())
    torch.testing.assert_close(out.grads, torch.tensor([0.0, 1.0, 1.0]), atol=1e-6, rtol=0)


MODULES = [
    m.name
    for m in pkgutil.walk_packages(fastmtl.__path__, "fastmtl.")
    if not m.name.endswith(("__main__", "._C")) and not m.name.startswith("fastmtl.integrations.")
]


def run_examples(module: str) -> None:
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(module), optionflags=options).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    run_examples(name)
