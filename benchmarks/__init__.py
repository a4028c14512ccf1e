"""What repeats the figures of docs/lab: `python -m benchmarks.NAME` in a checkout."""
