"""Checkpoint against bundle on the same images: classes, logits, boxes and gate, from JPEG to answer.

usage: bundle_parity.py CHECKPOINT.npz BUNDLE.npz

The files are what `mge-eval --ckpt ... --predictions` and `mge-eval --engine ... --predictions` write. Exit code 1
where a limit is not met: in every head all images but at most one keep their class, the boxes' IoU has a median of 1.0
and a 1st percentile of at least 0.95. The median crop must keep at most 60 % of its view, else boxes say little.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from mge_runtime.compare import box_area, box_iou

CHANGES = 1  # images whose class may change, in each head
IOU_MEDIAN, IOU_P1 = 1.0, 0.95
CROP_AREA = 0.6  # of its view, the median


def compare(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> list[str]:
    """Print one line for each kind of answer; return what is not met."""
    missed: list[str] = []
    for key in (name for name in second if name.startswith("logits/")):
        a, b = first[key], second[key]
        same = int((a.argmax(1) == b.argmax(1)).sum())
        relative = (np.abs(a - b).max(1) / np.abs(a).max(1)).max()
        print(f"{key:<20} same class {same}/{len(a)}, largest relative difference {relative:.1e}")
        if len(a) - same > CHANGES:
            missed.append(f"{key}: {len(a) - same} classes change; expected at most {CHANGES}")
    views = first["views"]
    for k in range(1, views.shape[1]):
        iou = box_iou(views[:, k], second["views"][:, k])
        median, p1 = np.median(iou), np.quantile(iou, 0.01)
        area = np.median(box_area(views[:, k]) / box_area(views[:, k - 1]))
        name = f"view {k + 1}"
        print(f"{name:<20} box IoU median {median:.4f}, 1st percentile {p1:.4f}; crop keeps {100 * area:.0f} %")
        if not (median >= IOU_MEDIAN and p1 >= IOU_P1):
            missed.append(f"{name}: box IoU; expected a median of {IOU_MEDIAN} and a 1st percentile of {IOU_P1}")
        if not area <= CROP_AREA:
            missed.append(f"{name}: the median crop keeps {100 * area:.0f} %; expected at most {100 * CROP_AREA:.0f} %")
    print(f"gate                 largest difference {np.abs(first['gate'] - second['gate']).max():.1e}")
    return missed


def main() -> int:
    """Compare two files; 1 where a limit is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help=".npz of the checkpoint's answers")
    parser.add_argument("bundle", help=".npz of the bundle's")
    arguments = parser.parse_args()
    with np.load(arguments.checkpoint) as first, np.load(arguments.bundle) as second:
        if first["names"].tolist() != second["names"].tolist():
            raise SystemExit("the two files are not about the same images")
        print(f"{len(first['names'])} images")
        missed = compare(dict(first), dict(second))
    for line in missed:
        print(f"not met: {line}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
