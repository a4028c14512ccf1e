"""What repeats the figures of docs/performance.md and docs/results.md: `python -m benchmarks.NAME` in a checkout."""
