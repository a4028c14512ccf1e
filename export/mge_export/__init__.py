"""Export a trained mixture of granularity-specific experts to one bundle."""
