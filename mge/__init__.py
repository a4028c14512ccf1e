"""Mixtures of granularity-specific experts for fine-grained classification (MGE-CNN, ICCV 2019)."""
