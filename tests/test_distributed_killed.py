"""A rank that is killed: the launcher ends the job, and the example goes on from its checkpoint."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

ROOT = Path(__file__).parents[1]
EPOCHS = 2
TIMEOUT = 100  # seconds for one job
SECONDS = 45  # for the launcher to notice that a process has died, and to end the others


def launch(size: int, folder: Path, kill_before: int | None = None) -> tuple[int, str]:
    """The example under the launcher: exit status, and what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command += ["-m", "tests.killed_rank", str(kill_before)] if kill_before else []
    command += ["examples/distributed.py", f"--epochs={EPOCHS}", f"--checkpoint={folder}"]
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        said, _ = job.communicate(timeout=TIMEOUT)
    finally:
        job.terminate()  # the launcher ends its processes; it has ended itself if all went well
    return job.returncode, said


def end(folder: Path) -> dict[str, Any]:
    """All that the last checkpoint holds: parameters, the method's state, the optimizer's."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder / str(EPOCHS), folder / "whole.pt")
    leaves = pytree.tree_leaves_with_path(torch.load(folder / "whole.pt"))
    return {pytree.keystr(path): x for path, x in leaves}


def assert_same(found: dict[str, Any], expected: dict[str, Any], rtol: float) -> None:
    assert found.keys() == expected.keys()
    assert any("heads" in name for name in found)
    assert any("exp_avg_sq" in name for name in found)
    for name, x in expected.items():
        if isinstance(x, Tensor):
            scale = float(x.double().abs().max()) if x.numel() else 0.0
            torch.testing.assert_close(found[name], x, rtol=rtol, atol=rtol * scale, msg=name)
        else:
            assert found[name] == x, name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    status, said = launch(2, folder)
    assert status == 0, said
    assert "resumed" not in said
    return end(folder)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a job whose second process died in its second epoch, and left half of another behind."""
    folder = tmp_path_factory.mktemp("killed")
    status, said = launch(2, folder, kill_before=80)
    ended = time.time()
    assert status != 0
    assert "epoch 0" in said
    assert "epoch 1" not in said
    moment = re.search(r"killed at ([\d.]+)", said)
    assert moment, said
    assert ended - float(moment[1]) < SECONDS
    (folder / "2").mkdir()
    (folder / "2" / "__0_0.distcp").write_bytes(b"half")
    return folder


def test_a_killed_rank_ends_the_job_and_another_run_resumes_it(killed: Path, tmp_path: Path) -> None:
    # The example itself compares its parameters with those of one process that nobody killed.
    status, said = launch(2, shutil.copytree(killed, tmp_path / "resumed"))
    assert status == 0, said
    assert "2 processes, resumed after 1 epochs" in said
    assert "the same to the bit in all 2 processes: yes" in said
    difference = re.search(r"whole batches: (\S+)", said)
    assert difference, said
    assert float(difference[1]) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("size", "rtol"), [(2, 0.0), (1, 1e-9)])
def test_resumed_as_if_uninterrupted(
    killed: Path, uninterrupted: dict[str, Any], tmp_path: Path, size: int, rtol: float
) -> None:
    folder = shutil.copytree(killed, tmp_path / "resumed")
    status, said = launch(size, folder)
    assert status == 0, said
    assert f"{size} processes, resumed after 1 epochs" in said
    assert_same(end(folder), uninterrupted, rtol)
