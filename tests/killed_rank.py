"""A script in which rank 1 dies: ``torchrun ... -m tests.killed_rank STEPS SCRIPT ARGUMENTS``.

It is killed before its optimizer's step of that number.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time

from torch.optim.optimizer import register_optimizer_step_pre_hook


def kill_before(number: int) -> None:
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == number:
            print(f"killed at {time.time()}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_pre_hook(count)


if __name__ == "__main__":
    number, sys.argv = int(sys.argv[1]), sys.argv[2:]
    if os.environ["RANK"] == "1":
        kill_before(number)
    runpy.run_path(sys.argv[0], run_name="__main__")
