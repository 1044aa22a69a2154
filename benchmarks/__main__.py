"""All CPU benchmarks, under five minutes: ``python -m benchmarks``. Options as for each of them (``--help``)."""

import subprocess
import sys

QUESTIONS = ("kernels", "aggregate", "solvers", "steps", "memory", "sparse")

for question in QUESTIONS:  # each in a process of its own: threads, allocator and caches as it wants them
    status = subprocess.run([sys.executable, "-m", f"benchmarks.{question}", *sys.argv[1:]], check=False).returncode
    if status != 0:
        sys.exit(status)
