"""Compare what `mge-eval --predictions` wrote about the same images: of a checkpoint, a bundle, an INT8 bundle, a seed.

    python -m benchmarks.predictions --first A-s0.npz A-s1.npz --second B-s0.npz B-s1.npz --head mixture \
        --second-head "expert 1 global"
    python -m benchmarks.predictions --first checkpoint.npz --second bundle.npz --parity

Printed is the difference of top-1, first minus second, with a paired 95 % bootstrap interval over images. Several files
on one side are seeds: an image counts with the share of seeds that got it right, and the spread over seeds is printed
beside it. With --parity two files are compared head by head, box by box, and the exit code is 1 where a limit is
missed: in every head all images but at most one keep their class, and the boxes' IoU has a median of 1.0 and a 1st
percentile of at least 0.95. The median crop must keep at most 60 % of its view, else boxes say little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

import numpy as np

from mge.evaluation import top_k_correct
from mge_runtime.compare import box_area, box_iou
from mge_runtime.metrics import mean_interval

CHANGES = 1  # images whose class may change, in each head
IOU_MEDIAN, IOU_P1 = 1.0, 0.95
CROP_AREA = 0.6  # of its view, the median

Arrays = Mapping[str, np.ndarray]


def compare_top1(sides: list[tuple[list[Arrays], str]]) -> None:
    """Print the accuracy of both sides, each some files and a head, and their difference."""
    shares: list[np.ndarray] = []
    for files, head in sides:
        for file in files:
            if f"logits/{head}" not in file:
                heads = [name.removeprefix("logits/") for name in file if name.startswith("logits/")]
                raise SystemExit(f"there is no head {head!r}; there are {', '.join(heads)}")
        right = [top_k_correct(file[f"logits/{head}"], file["labels"]) for file in files]
        accuracies = [100 * one.mean() for one in right]
        print(f"{head:<18}{np.mean(accuracies):7.2f} %   seeds: {' '.join(f'{value:.2f}' for value in accuracies)}")
        shares.append(np.mean(right, axis=0))
    found, images = mean_interval(100 * (shares[0].astype(float) - shares[1])), len(shares[0])
    print(f"difference {found.value:+.2f} points, 95 % interval [{found.low:+.2f}, {found.high:+.2f}], {images} images")


def compare_parity(first: Arrays, second: Arrays) -> list[str]:
    """Print one line for each kind of output; return the limits that are missed."""
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


def load(path: str) -> Arrays:
    """Every array of a file."""
    with np.load(path) as arrays:
        return dict(arrays)


def main() -> int:
    """Compare; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", nargs="+", required=True, help=".npz files")
    parser.add_argument("--second", nargs="+", required=True, help=".npz files")
    parser.add_argument("--head", default="mixture", help="of the first side (default: %(default)s)")
    parser.add_argument("--second-head", help="of the second (default: the same)")
    parser.add_argument("--parity", action="store_true", help="also compare class, logits, boxes and gate")
    arguments = parser.parse_args()
    first, second = ([load(path) for path in paths] for paths in (arguments.first, arguments.second))
    names = first[0]["names"].tolist()
    if any(file["names"].tolist() != names for file in (*first, *second)):
        raise SystemExit("the files are not about the same images")
    if "labels" in first[0]:
        compare_top1([(first, arguments.head), (second, arguments.second_head or arguments.head)])
    missed: list[str] = []
    if arguments.parity:
        if (len(first), len(second)) != (1, 1):
            raise SystemExit("--parity compares one file with one file")
        missed = compare_parity(first[0], second[0])
    for line in missed:
        print(f"not met: {line}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
