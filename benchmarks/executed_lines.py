"""How many lines of `mge_runtime` run to open a bundle and to predict one image on a CPU, and in which files.

    python benchmarks/executed_lines.py mge.plan image.jpg

`sys.settrace` reports every line that runs, in any thread. Counted is each line once for `Pipeline.open` (with the
modules that it imports itself, but not those of `from mge_runtime import Pipeline`) and once for `predict`, the
likeliest classes included.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from mge_runtime import Pipeline, pipeline

_ROOT = Path(pipeline.__file__).parent


def executed(function: Callable[[], Any]) -> tuple[Any, dict[str, set[int]]]:
    """What a function returns, and the lines of `mge_runtime` that it ran, by file."""
    lines: dict[str, set[int]] = defaultdict(set)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if _ROOT not in path.parents:
            return None
        if event == "line":
            lines[path.relative_to(_ROOT).as_posix()].add(frame.f_lineno)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)
    try:
        return function(), lines
    finally:
        sys.settrace(None)
        threading.settrace(None)  # pyright: ignore[reportArgumentType]


def main(bundle: str, image: str) -> None:
    """Print the lines of each file."""
    opened, opening = executed(lambda: Pipeline.open(bundle, "cpu"))
    _, predicting = executed(lambda: opened.predict(image).top)
    opened.close()
    files = sorted({*opening, *predicting}, key=lambda name: -len(opening[name]) - len(predicting[name]))
    print(" open predict file")
    for name in files:
        print(f"{len(opening[name]):5} {len(predicting[name]):7} {name}")
    totals = [sum(map(len, lines.values())) for lines in (opening, predicting)]
    print(f"{totals[0]:5} {totals[1]:7} {sum(totals)} lines in {len(files)} files")


if __name__ == "__main__":
    main(*sys.argv[1:3])
