"""docs/integrations.md and the examples in the integrations' docstrings run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import run_blocks, run_examples

pytestmark = pytest.mark.filterwarnings("default")  # of libraries that are not ours
LIBRARIES = ["torchjd", "lightning", "accelerate", "transformers"]


def test_none_is_imported_with_fastmtl() -> None:
    program = f"import sys, fastmtl, fastmtl.compat; sys.exit(len({{*{LIBRARIES}}} & {{*sys.modules}}))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_page(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in LIBRARIES:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    run_blocks("docs/integrations.md")


@pytest.mark.parametrize("library", LIBRARIES)
def test_docstrings(library: str) -> None:
    pytest.importorskip(library)
    run_examples(f"fastmtl.integrations.{library}")
