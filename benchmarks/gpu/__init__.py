"""What the owner of a GPU runs: `python -m benchmarks.gpu` (docs/gpu_suite.md)."""
