"""What repeats the figures of docs/lab/performance.md and docs/lab/results.md: `python -m benchmarks.NAME` in a checkout."""
