"""The reference of the start-up: Python and ONNX Runtime, the same stages from plain files, run once, wired by name.

A script of its own that imports nothing of this project: it is run by its path, in a fresh process, and prints what
`child` prints. Options are ONNX Runtime's defaults but for the number of threads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(folder: str, frame: str, size: str, threads: str, provider: str, *stages: str) -> None:
    """Open every stage, run the chain once, report.

    Args:
        folder: with `<stage>.onnx` and the weights beside it.
        frame: a file of uint8 [S, S, 3].
        size: S.
        threads: of each session.
        provider: of ONNX Runtime.
        stages: names, in the order they run.
    """
    import numpy as np

    from mge_runtime.backends.onnxruntime import load_onnxruntime

    onnxruntime = load_onnxruntime()

    sessions: list[Any] = []
    for stage in stages:
        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        model = str(Path(folder) / f"{stage}.onnx")
        sessions.append(onnxruntime.InferenceSession(model, options, providers=[provider, "CPUExecutionProvider"]))
    tensors: dict[str, Any] = {"frame": np.fromfile(frame, np.uint8).reshape(1, int(size), int(size), 3)}
    for session in sessions:
        names = [output.name for output in session.get_outputs()]
        values = session.run(names, {tensor.name: tensors[tensor.name] for tensor in session.get_inputs()})
        tensors.update(zip(names, values))  # noqa: B905 - as short as anybody writes it
    print("answered", flush=True)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    print(json.dumps({"peak": peak}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
