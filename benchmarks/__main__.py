"""All CPU benchmarks, a few minutes: ``python -m benchmarks``. Options as for each of them (``--help``)."""

import runpy

for question in ("kernels", "aggregate", "solvers", "steps"):
    runpy.run_module(f"benchmarks.{question}", run_name="__main__")
