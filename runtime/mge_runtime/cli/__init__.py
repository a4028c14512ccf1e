"""The commands that run on a device: `mge-run`, `mge-bench`, `mge-build` and `mge-info`."""
