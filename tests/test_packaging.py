"""The wheel and the source distribution hold what they should, and the wheel works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAIN = """
import pathlib, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]  # not this checkout's
import fastmtl, torch
assert pathlib.Path(fastmtl.__file__).is_relative_to(sys.argv[1]), fastmtl.__file__
assert fastmtl.__version__ != "unknown"
trunk, heads = torch.nn.Linear(4, 3), [torch.nn.Linear(3, 1) for _ in range(2)]
z = trunk(torch.randn(8, 4))
out = fastmtl.backward([h(z).square().mean() for h in heads], fastmtl.PCGrad(), trunk)
assert out.weights.isfinite().all() and trunk.weight.grad.abs().sum() > 0
"""


def run(*command: object, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def install(source: Path, target: Path, **env: str) -> None:
    options = ["-q", "--no-build-isolation", "--no-deps", "--target", target]
    run("-m", "pip", "install", *options, source, cwd=target, **env)


@pytest.fixture
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of what git tracks, so that nothing built here leaks in."""
    copy = tmp_path_factory.mktemp("checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def test_wheel_from_the_source_distribution(checkout: Path, tmp_path: Path) -> None:
    run("-m", "build", "--no-isolation", "--outdir", tmp_path, cwd=checkout)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.startswith("fastmtl/_C") for n in names)
    assert "fastmtl/py.typed" in names
    assert {f"fastmtl/demo/data/{data}.npz" for data in ("reviews", "groceries")} <= set(names)
    assert not any(n.startswith(("tests/", "benchmarks/", "csrc/")) for n in names)
    site = tmp_path / "site"
    site.mkdir()
    install(wheel, site)
    run("-c", TRAIN, site, cwd=tmp_path, PYTHONPATH=str(site), FASTMTL_REQUIRE_EXT="1")


def test_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    install(checkout, tmp_path, FASTMTL_NO_EXT="1")
    said = run("-c", TRAIN, tmp_path, cwd=tmp_path, PYTHONPATH=str(tmp_path), FASTMTL_REQUIRE_EXT="0")
    assert said.count("slow pure-PyTorch reference") == 1, said
