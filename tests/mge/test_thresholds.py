"""Thresholds follow the area that crops keep."""

import torch

from mge.attention import attention_box
from mge.training.thresholds import CANDIDATES, crop_report, median_area, propose_threshold


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


def test_maps_of_few_cells_are_pointed_out():
    first, size = list(crop_report([maps(), maps()], (160, 160), [0.6]))
    threshold, area = propose_threshold(maps(), 160, 0.5)
    kept = median_area(maps(), 160, 0.6)
    assert f"threshold 0.60 keeps a median of {100 * kept:.0f} %" in first
    assert f"{threshold:.2f} would keep {100 * area:.0f} %" in first
    assert size == "attention maps: 5 x 5 cells"
    *_, size, hint = crop_report([maps()[:, :4, :4]] * 2, (112, 112), [0.6])
    assert size == "attention maps: 4 x 4 cells"
    assert hint.startswith("hint:")
    assert "--image-size 224 would give 7 x 7" in hint
    assert not list(crop_report([maps()], (160,), []))  # a single expert crops nothing
