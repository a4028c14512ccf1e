"""Check that a bundle runs as it should on this device: `mge-bench --selfcheck` and the tests marked `gpu`."""

from mge_runtime.bench_report import CheckReport, Result
from mge_runtime.bench_subject import Images, Subject, open_subject
from mge_runtime.selfcheck.checks import all_checks, check_refused, run_checks
from mge_runtime.selfcheck.memory import check_memory
from mge_runtime.selfcheck.outputs import check_batches, check_copies, check_graphs, check_parity, check_together

__all__ = [
    "CheckReport",
    "Images",
    "Result",
    "Subject",
    "all_checks",
    "check_batches",
    "check_copies",
    "check_graphs",
    "check_memory",
    "check_parity",
    "check_refused",
    "check_together",
    "open_subject",
    "run_checks",
]
