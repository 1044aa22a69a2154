"""Every Python block of the README, of CONTRIBUTING and of docs/ runs, in order; so does every docstring's example."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fastmtl

ROOT = Path(__file__).parent.parent


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    namespace: dict = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


def test_readme_values() -> None:
    # The values that the README's comments promise.
    import torch

    jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    out = fastmtl.aggregate(jacobian, fastmtl.MGDA())
    torch.testing.assert_close(out.grads, torch.tensor([0.0, 1.0, 1.0]), atol=1e-6, rtol=0)


MODULES = [
    m.name for m in pkgutil.walk_packages(fastmtl.__path__, "fastmtl.") if not m.name.endswith(("__main__", "._C"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    results = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert results.failed == 0
