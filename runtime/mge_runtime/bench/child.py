"""A fresh process that opens a bundle and answers one frame: `python -m mge_runtime.bench.child`, for `fresh`.

Two lines come out: `answered` at the first answer, then what the process took as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

__all__ = ["main", "peak_memory"]


def peak_memory() -> int | None:
    """Most bytes that were resident in this process so far; None where the system does not say it as Linux does."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def main(engine: str, frame: str, device: str, backend: str, threads: str, weights: str = "mapped") -> None:
    """Open, answer, report.

    Args:
        engine: the bundle.
        frame: a file of uint8 [S, S, 3].
        device: "cpu" or "cuda:0".
        backend: "onnxruntime", ...
        threads: a number, or "all".
        weights: "mapped" or "loaded".
    """
    from mge_runtime.pipeline import Pipeline

    count = None if threads == "all" else int(threads)
    with Pipeline.open(engine, device, backend, count, mmap=weights == "mapped") as pipeline:
        import numpy as np

        size = pipeline.manifest.preprocess.size
        pipeline.run(np.fromfile(frame, np.uint8).reshape(1, size, size, 3))
        print("answered", flush=True)
        used = None
        if device.startswith("cuda:"):
            from mge_runtime.selfcheck.memory import device_memory

            used = device_memory(int(device.partition(":")[2]))
        print(json.dumps({"peak": peak_memory(), "device": used, "report": pipeline.report()}), flush=True)


if __name__ == "__main__":
    from mge_runtime.errors import MGEError

    try:
        main(*sys.argv[1:])
    except MGEError as error:
        raise SystemExit(f"error: {error}") from error
