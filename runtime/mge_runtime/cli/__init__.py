"""The commands that run on a device: `mge-run` and `mge-info`."""
