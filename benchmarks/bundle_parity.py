"""Checkpoint against bundle on the same images: classes, logits, boxes and gate, from JPEG to answer.

usage: bundle_parity.py CHECKPOINT.npz BUNDLE.npz

The files are what `mge-eval --ckpt ... --predictions` and `mge-eval --engine ... --predictions` write.
"""

from __future__ import annotations

import sys

import numpy as np


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [..., 4] with [..., 4]."""
    low, high = np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])
    shared = np.prod(np.maximum(high - low, 0), -1)
    areas = [np.prod(boxes[..., 2:] - boxes[..., :2], -1) for boxes in (first, second)]
    return shared / (areas[0] + areas[1] - shared)


def main() -> None:
    """Print one line for each kind of answer."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    with np.load(sys.argv[1]) as first, np.load(sys.argv[2]) as second:
        if first["names"].tolist() != second["names"].tolist():
            raise SystemExit("the two files are not about the same images")
        print(f"{len(first['names'])} images")
        for key in (name for name in second if name.startswith("logits/")):
            a, b = first[key], second[key]
            same = int((a.argmax(1) == b.argmax(1)).sum())
            relative = (np.abs(a - b).max(1) / np.abs(a).max(1)).max()
            print(f"{key:<20} same class {same}/{len(a)}, largest relative difference {relative:.1e}")
        for k in range(1, first["views"].shape[1]):
            iou = box_iou(first["views"][:, k], second["views"][:, k])
            print(f"view {k + 1:<15} box IoU median {np.median(iou):.4f}, 1st percentile {np.quantile(iou, 0.01):.4f}")
        print(f"gate                 largest difference {np.abs(first['gate'] - second['gate']).max():.1e}")


if __name__ == "__main__":
    main()
