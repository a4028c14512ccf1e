"""The part that decides: its boxes on disk, and how well a chain of crops treats it.

Boxes are (x0, y0, x1, y1) in pixels of the source image, half-open.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mge_runtime.compare import box_area
from mge_runtime.errors import InputError
from mge_runtime.files import atomic_path

PARTS_FILE = "parts.csv"
KEPT_SHARE = 0.9  # a view keeps the part if it shows at least this share of the part's area
_HEADER = ["path", "x0", "y0", "x1", "y1"]

Box = tuple[float, float, float, float]


def view_areas(views: NDArray[Any]) -> NDArray[np.float64]:
    """Share of the first view that each view shows: boxes [N, K, 4] in source pixels to [N, K] in (0, 1]."""
    areas = box_area(views)
    return areas / areas[:, :1]


def part_report(parts: NDArray[Any], views: NDArray[Any]) -> tuple[list[float], list[float]]:
    """How often each expert's view keeps the part, and how much larger the part has become.

    Every view is resized to the same square, so a view of W x H pixels of the source enlarges what it shows by 1 / W
    across and 1 / H down. The enlargement is the geometric mean of the two, against view 1: sqrt(W_1 H_1 / (W_k H_k)).
    Images whose part is lost count like all others.

    Args:
        parts: [N, 4], the box of each image's part, none empty.
        views: [N, K, 4], what each expert saw (`compose_boxes` of the runtime), none empty; view 1 is the frame.

    Returns:
        For each expert the share of images whose view keeps the part, in [0, 1], and the median enlargement, > 0.
    """
    whole = parts[:, None]
    shown = np.concatenate([np.maximum(whole[..., :2], views[..., :2]), np.minimum(whole[..., 2:], views[..., 2:])], -1)
    kept = (box_area(shown) >= (KEPT_SHARE - 1e-9) * box_area(whole)).mean(axis=0)
    return kept.tolist(), np.median(view_areas(views) ** -0.5, axis=0).tolist()


def read_parts(folder: str | os.PathLike[str]) -> dict[str, Box] | None:
    """Read `parts.csv` of a split's folder: the box of each image by its path below; None if the folder has none.

    Raises:
        InputError: the file is no such table, or a box is empty.
    """
    source = Path(folder) / PARTS_FILE
    if not source.is_file():
        return None
    expected = f"expected the columns {','.join(_HEADER)} with numbers, x0 < x1 and y0 < y1: repair or remove the file"
    try:
        with source.open(encoding="utf-8", newline="") as lines:
            header, *rows = list(csv.reader(lines)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source}: found a file that cannot be read ({error}); {expected}") from error
    if header != _HEADER:
        raise InputError(f"{source}: found the header {','.join(header)!r}; {expected}")
    parts: dict[str, Box] = {}
    for number, row in enumerate(rows, 2):
        try:
            x0, y0, x1, y1 = (float(value) for value in row[1:])
        except ValueError:
            x0 = y0 = x1 = y1 = 0.0
        if not (x0 < x1 and y0 < y1):
            raise InputError(f"{source}, line {number}: found {','.join(row)!r}; {expected}")
        parts[row[0]] = (x0, y0, x1, y1)
    return parts


def write_parts(folder: str | os.PathLike[str], parts: Mapping[str, Box]) -> None:
    """Write `parts.csv` into a split's folder, whole or not at all.

    Raises:
        OutputError: the folder is missing or cannot be written.
    """
    with atomic_path(Path(folder) / PARTS_FILE) as draft, draft.open("w", encoding="utf-8", newline="") as lines:
        rows = csv.writer(lines, lineterminator="\n")
        rows.writerow(_HEADER)
        rows.writerows([path, *box] for path, box in parts.items())
