"""Check that a bundle runs as it should on this device: `mge-bench --selfcheck` and the tests marked `gpu`."""

from mge_runtime.selfcheck.memory import check_memory
from mge_runtime.selfcheck.outputs import check_batches, check_copies, check_graphs, check_parity, check_together
from mge_runtime.selfcheck.report import Report, all_checks, check_refused, run_checks
from mge_runtime.selfcheck.subject import Frames, Result, Subject, drawn_frames, open_subject

__all__ = [
    "Frames",
    "Report",
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
    "drawn_frames",
    "open_subject",
    "run_checks",
]
