"""Run a trained mixture of granularity-specific experts without PyTorch."""
