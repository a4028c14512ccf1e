"""The part that decides: its boxes on disk, and how well a chain of crops treats it.

Boxes are (x0, y0, x1, y1) in pixels of the source image, half-open.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mge_runtime.errors import InputError
from mge_runtime.files import atomic_path

__all__ = ["KEPT_SHARE", "PARTS_FILE", "PartReport", "Parts", "part_report", "read_parts", "write_parts"]

PARTS_FILE = "parts.csv"
KEPT_SHARE = 0.9  # a view keeps the part if it shows at least this share of the part's area
_HEADER = ["path", "x0", "y0", "x1", "y1"]

Box = tuple[float, float, float, float]
Parts = dict[str, Box]  # path below the split's folder, with "/", to the part's box


@dataclass(frozen=True)
class PartReport:
    """What the views of K experts make of the deciding parts of N images; one value per expert."""

    kept: tuple[float, ...]  # share of images whose view keeps the part, 0..1
    enlargement: tuple[float, ...]  # median over images, linear: the part's side in view k against view 1; > 0


def part_report(
    parts: NDArray[np.floating[Any]], views: NDArray[np.floating[Any]], *, kept_share: float = KEPT_SHARE
) -> PartReport:
    """Say how often each expert's view keeps the part, and how much larger the part has become.

    Every view is resized to the same square, so a view of W x H pixels of the source enlarges what it shows by 1 / W
    across and 1 / H down. The linear enlargement is the geometric mean of the two, against view 1:

        sqrt((W_1 * H_1) / (W_k * H_k))

    Images whose part is lost count in the median like all others.

    Args:
        parts: [N, 4], the box of each image's part.
        views: [N, K, 4], what each expert saw (`compose_boxes` of the runtime); view 1 is the frame.
        kept_share: the share of the part's area that a view must show to keep it, in (0, 1].

    Raises:
        ValueError: the shapes do not fit together, or a box is empty.
    """
    parts, views = np.asarray(parts, np.float64), np.asarray(views, np.float64)
    if parts.ndim != 2 or views.ndim != 3 or parts.shape != (len(views), 4) or views.shape[2] != 4 or not len(views):
        raise ValueError(f"found parts {parts.shape} and views {views.shape}, expected [N, 4] and [N, K, 4] with N > 0")
    part_area, view_area = _area(parts), _area(views)
    if not (part_area > 0).all() or not (view_area > 0).all():
        raise ValueError("found an empty box, expected x0 < x1 and y0 < y1 in every part and view")
    whole = parts[:, None]
    shown = np.concatenate([np.maximum(whole[..., :2], views[..., :2]), np.minimum(whole[..., 2:], views[..., 2:])], -1)
    share = _area(shown) / part_area[:, None]
    kept = (share >= kept_share - 1e-9).mean(axis=0)
    enlargement = np.median(np.sqrt(view_area[:, :1] / view_area), axis=0)
    return PartReport(tuple(kept.tolist()), tuple(enlargement.tolist()))


def read_parts(folder: str | os.PathLike[str]) -> Parts | None:
    """Read `parts.csv` of a split's folder; None if the folder has none.

    Raises:
        InputError: the file is no such table, or a box is empty.
    """
    source = Path(folder) / PARTS_FILE
    if not source.is_file():
        return None
    expected = f"expected the columns {','.join(_HEADER)} with numbers, x0 < x1 and y0 < y1; repair or remove the file"
    parts: Parts = {}
    try:
        with source.open(encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines)
            header = next(rows, [])
            if header != _HEADER:
                raise InputError(f"{source}: found the header {','.join(header)!r}, {expected}")
            for number, row in enumerate(rows, start=2):
                if len(row) != len(_HEADER):
                    raise InputError(f"{source}, line {number}: found {len(row)} columns, {expected}")
                try:
                    x0, y0, x1, y1 = (float(value) for value in row[1:])
                except ValueError:
                    raise InputError(f"{source}, line {number}: found {','.join(row[1:])!r}, {expected}") from None
                if not (x0 < x1 and y0 < y1):
                    raise InputError(f"{source}, line {number}: found the box {','.join(row[1:])}, {expected}")
                parts[row[0]] = (x0, y0, x1, y1)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source}: found a file that cannot be read ({error}), {expected}") from error
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


def _area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the areas of boxes [..., 4]; 0 for an empty one."""
    sides = np.maximum(0, boxes[..., 2:] - boxes[..., :2])
    return sides[..., 0] * sides[..., 1]
