"""Box IoU, relative differences, class margins and what is out of tolerance, against numbers found by hand."""

from dataclasses import replace

import numpy as np
import pytest

from mge_runtime.compare import (
    TOLERANCES,
    box_area,
    box_failures,
    box_iou,
    class_failures,
    class_margins,
    finite,
    frame_boxes,
    relative_difference,
    same_boxes,
)
from mge_runtime.manifest import Crops


def test_boxes_overlap_by_their_common_pixels():
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 2, 2]], np.float32)
    others = np.array([[0, 0, 4, 4], [2, 2, 6, 6], [2, 0, 4, 2]], np.float32)
    assert box_area(boxes).tolist() == [16, 16, 4]
    assert box_iou(boxes, others) == pytest.approx([1, 4 / 28, 0])


def test_boxes_of_crops_are_carried_to_the_frame():
    boxes = [np.array([[8, 8, 24, 24]], np.float32), np.array([[0, 0, 32, 32]], np.float32)]
    frame = frame_boxes(boxes, Crops((32,) * 3))
    assert frame.shape == (2, 1, 4)
    assert frame[0, 0].tolist() == [8, 8, 24, 24]
    assert box_iou(frame[0], frame[1]) == pytest.approx([1], abs=0.15)
    assert frame_boxes([], Crops((32,))).shape == (0, 0, 4)


def test_differences_are_of_the_largest_value():
    reference = np.array([[4, -2], [0, 0], [0, 0], [1, 1]], np.float32)
    found = np.array([[3, -2], [0, 0], [0, 1], [np.nan, 1]], np.float32)
    relative = relative_difference(found, reference)
    assert relative[:3].tolist() == [0.25, 0, np.inf]
    assert not relative[3] <= 1
    assert [finite(value) for value in relative[:3]] == [0.25, 0.0, "inf"]


def test_margins_are_nothing_where_classes_agree():
    reference = np.array([[4.0, 3.0], [4.0, 3.0]])
    assert class_margins(np.array([[9.0, 1.0], [1.0, 9.0]]), reference).tolist() == [0, 0.25]


@pytest.mark.parametrize(
    ("images", "changed", "margin", "failed"),
    [(12, 0, 0.0, False), (12, 1, 0.5, True), (12, 1, 1e-5, False), (538, 1, 0.5, False), (538, 2, 0.5, True)],
)
def test_classes_may_change_on_ties_and_on_few_of_many(images, changed, margin, failed):
    changes = [True] * changed + [False] * (images - changed)
    lines = class_failures("here", changes, [margin] * images, TOLERANCES["fp32"])
    assert bool(lines) == failed
    assert not failed or lines[0].startswith(f"here: {changed} of {images} images change their class; expected at most")


@pytest.mark.parametrize(
    ("ious", "said"),
    [
        ([], []),
        ([1.0] * 11 + [0.5], []),
        ([1.0] * 10 + [0.5] * 2, ["2 of 12 boxes have an IoU below 0.95; expected at most 1"]),
        ([1.0] * 196 + [0.5] * 4, ["1st percentile of box IoU 0.500; expected at least 0.95"]),
        ([0.97] * 3, ["median box IoU 0.970; expected at least 1"]),
    ],
)
def test_boxes_may_lie_elsewhere_on_one_image_or_one_percent(ious, said):
    assert box_failures("box", ious, TOLERANCES["fp32"]) == [f"box: {line}" for line in said]
    assert box_failures("box", ious, replace(TOLERANCES["fp32"], box_iou_p1=0, box_iou_median=0)) == []


def test_boxes_are_the_same_but_for_rounding():
    boxes = np.array([[1, 2, 30, 40], [0, 0, 5, 5]], np.float32)
    assert same_boxes(boxes, boxes + np.float32(1e-4)).tolist() == [True, True]
    assert same_boxes(boxes, boxes + np.array([[0, 0, 1, 0], [0, 0, 0, 0]])).tolist() == [False, True]
