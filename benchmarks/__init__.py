"""One script per question; ``python -m benchmarks`` runs those of the CPU. Results: ``benchmarks/results/``."""
