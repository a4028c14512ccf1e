"""Compare two kinds of answers on the same images: difference of top-1 with a paired bootstrap interval.

usage: compare_answers.py --ours A-s0.npz A-s1.npz --head mixture --theirs B-s0.npz B-s1.npz --other "expert 1 global"

The files are what `mge-eval --predictions` writes. Several files on one side are seeds: an image counts with the share
of seeds that got it right. The interval is over images; it does not hold the spread over seeds, which is printed too.
"""

from __future__ import annotations

import argparse

import numpy as np

from mge.evaluation import top_k_correct
from mge_runtime.metrics import bootstrap_mean


def correct(path: str, head: str) -> tuple[list[str], np.ndarray]:
    """Names of the images and whether the head got them right."""
    with np.load(path) as answers:
        if f"logits/{head}" not in answers:
            heads = [name.removeprefix("logits/") for name in answers if name.startswith("logits/")]
            raise SystemExit(f"{path} has no head {head!r}; it has {', '.join(heads)}")
        return answers["names"].tolist(), top_k_correct(answers[f"logits/{head}"], answers["labels"])


def side(paths: list[str], head: str) -> tuple[list[str], np.ndarray]:
    """Names, and per image the share of seeds that got it right; prints the accuracy of every seed."""
    runs = [correct(path, head) for path in paths]
    if any(names != runs[0][0] for names, _ in runs):
        raise SystemExit(f"{', '.join(paths)} are not about the same images")
    accuracies = [100 * right.mean() for _, right in runs]
    print(f"{head:<18}{np.mean(accuracies):7.2f} %   seeds: {' '.join(f'{value:.2f}' for value in accuracies)}")
    return runs[0][0], np.mean([right for _, right in runs], axis=0)


def main() -> None:
    """Print both accuracies, their difference and its 95 % interval."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="+", required=True)
    parser.add_argument("--head", default="mixture")
    parser.add_argument("--theirs", nargs="+", required=True)
    parser.add_argument("--other", default="expert 1 global")
    options = parser.parse_args()
    names, ours = side(options.ours, options.head)
    other_names, theirs = side(options.theirs, options.other)
    if names != other_names:
        raise SystemExit("the two sides are not about the same images")
    mean, low, high = (100 * value for value in bootstrap_mean(ours.astype(float) - theirs))
    print(f"difference {mean:+.2f} points, 95 % interval [{low:+.2f}, {high:+.2f}], {len(names)} images\n")


if __name__ == "__main__":
    main()
