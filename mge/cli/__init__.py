"""The commands around a model: `mge-train`, `mge-eval` and `mge-field-guide`."""
