"""Thresholds follow the area that crops keep."""

import torch

from mge.attention import attention_box
from mge.training.thresholds import CANDIDATES, median_area, propose_threshold


def maps():
    return torch.rand(70, 5, 5, generator=torch.Generator().manual_seed(0))  # more than one chunk


def test_median_area_is_that_of_the_boxes():
    boxes = attention_box(maps(), 64, 0.6)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 64**2
    assert median_area(maps(), 64, 0.6) == areas.median().item()


def test_the_lowest_threshold_that_meets_the_target_is_proposed():
    threshold, area = propose_threshold(maps(), 64, 0.5)
    assert area <= 0.5
    assert area == median_area(maps(), 64, threshold)
    below = CANDIDATES[CANDIDATES.index(threshold) - 1]
    assert median_area(maps(), 64, below) > 0.5


def test_an_unreachable_target_gives_the_highest_candidate():
    assert propose_threshold(maps(), 64, 1e-9)[0] == CANDIDATES[-1]
