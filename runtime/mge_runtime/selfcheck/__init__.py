"""Check that a bundle runs as it should on this device: `mge-bench --selfcheck` and the tests marked `gpu`."""

from mge_runtime.selfcheck.checks import all_checks, run_checks

__all__ = ["all_checks", "run_checks"]
