"""Figures of merit of class scores and views, in NumPy; those of probabilities are in `mge_runtime.metrics`."""

from __future__ import annotations

import numpy as np

__all__ = ["top_k_correct", "view_areas"]


def top_k_correct(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """Whether the true class is among the k best: logits [N, C], labels [N] -> bool [N]. Ties go to the lower index."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return (best == labels[:, None]).any(1)


def view_areas(views: np.ndarray) -> np.ndarray:
    """Share of the first view that each view shows: boxes [N, K, 4] in source pixels -> [N, K] in (0, 1]."""
    areas = (views[..., 2] - views[..., 0]) * (views[..., 3] - views[..., 1])
    return areas / areas[:, :1]
