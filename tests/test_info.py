"""``python -m fastmtl``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmtl
from fastmtl import _C
from fastmtl.__main__ import main

ROOT = Path(__file__).parent.parent


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " kernels" not in line)
    assert lines["fastmtl"] == fastmtl.__version__
    assert lines["torch"].startswith(torch.__version__)
    assert lines["extension"].startswith("loaded")


def test_info_names_the_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("CPU kernels")]
    assert line.split()[-1] == _C.build_info()["cpu_capability"]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "usage: python -m fastmtl" in out
    assert "info" in out
    assert "demo" in out


def test_unknown_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fastmtl", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "usage: python -m fastmtl" in done.stderr
    assert "unknown command 'trian'" in done.stderr
