"""What happens where the compiled extension is missing: said once, with the cure, and everything still works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastmtl
from fastmtl import _extension

ROOT = Path(__file__).parent.parent
BLOCK = """
import sys, warnings
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "fastmtl._C":
            raise ImportError("libnone.so: cannot open shared object file")
sys.meta_path.insert(0, Blocker())
"""
TRAIN = """
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastmtl
(warning,) = [w for w in caught if "fastmtl" in str(w.message)]
text = str(warning.message)
assert warning.category is RuntimeWarning
assert "libnone.so: cannot open shared object file" in text, text
assert "pip install" in text and "python -m fastmtl info" in text, text
assert not hasattr(torch.ops.fastmtl, "gram")

torch.manual_seed(0)
x, y = torch.randn(32, 4), torch.randn(32, 2)
for method in (fastmtl.PCGrad(), fastmtl.GradVac(), fastmtl.MGDA(), fastmtl.GradNorm(scale_heads=False)):
    trunk, heads = torch.nn.Linear(4, 8), torch.nn.ModuleList(torch.nn.Linear(8, 1) for _ in range(2))
    surgery = fastmtl.FeatureSurgery(method, num_tasks=2)
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.05)
    values = []
    for step in range(60):
        optimizer.zero_grad()
        zs = surgery(trunk(x)) if step % 2 else (trunk(x),) * 2
        losses = [(h(z)[:, 0] - y[:, t]).pow(2).mean() for t, (h, z) in enumerate(zip(heads, zs))]
        if step % 2:
            surgery.total(losses).backward()
        else:
            fastmtl.backward(losses, method, trunk)
        optimizer.step()
        values.append(sum(float(v.detach()) for v in losses))
    assert values[-1] < 0.9 * values[0], (method, values)
out = fastmtl.aggregate(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), fastmtl.MGDA())
torch.testing.assert_close(out.grads, torch.tensor([0.0, 1.0, 1.0]))
try:
    fastmtl.solvers.min_norm([[1.0]])
except ImportError as error:
    assert "fastmtl.solvers needs the compiled extension (libnone.so" in str(error), error
else:
    raise AssertionError("solvers have no reference to fall back to")
x = torch.nn.Parameter(torch.ones(2))
x.grad = torch.ones(2)
fastmtl.backward(torch.eye(2) @ x, fastmtl.PCGrad(), [x])  # adds to an existing gradient
torch.testing.assert_close(x.grad, torch.tensor([2.0, 2.0]))
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "FASTMTL_REQUIRE_EXT"}
    command = [sys.executable, "-c", code] if code else [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True, timeout=300)


def test_the_tests_run_on_the_extension() -> None:
    assert _extension.module is not None
    assert _extension.kernels_on("cpu")
    assert not _extension.kernels_on("mps")
    assert _extension.module.build_info()["version"] == fastmtl.__version__


def test_one_warning_with_reason_and_cure_and_training_works() -> None:
    done = python(BLOCK + TRAIN)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["1", "0"])
def test_the_extension_may_be_required(value: str) -> None:
    done = python(BLOCK + "import fastmtl; print('imported')", FASTMTL_REQUIRE_EXT=value)
    if value == "1":
        assert done.returncode != 0
        assert "ImportError: fastmtl's compiled extension is required but missing: libnone.so" in done.stderr
        assert "Cure: reinstall" in done.stderr
    else:
        assert done.stdout.strip() == "imported"
        assert done.stderr.count("RuntimeWarning") == 1


def test_info_without_the_extension_says_what_to_do() -> None:
    code = BLOCK + "sys.argv = ['fastmtl', 'info']; import runpy; runpy.run_module('fastmtl', run_name='__main__')"
    done = python(code)
    assert done.returncode == 0
    assert "missing: libnone.so" in done.stdout
    assert "reinstall fastmtl" in done.stdout
