"""How far answers may be apart, and how they are compared."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from mge_runtime.compare import TOLERANCES
from mge_runtime.selfcheck.compare import compare, compared_tensors
from mge_runtime.selfcheck.limits import LIMITS, Limits
from mge_runtime.selfcheck.pictures import drawn_frames
from mge_runtime.selfcheck.subject import run_all


def test_the_limits_are_the_exports():
    for precision, theirs in TOLERANCES.items():
        ours = LIMITS[precision]
        for name in ("relative", "classes", "classes_of_few", "box_iou_median", "box_iou_p1", "chain_boxes"):
            assert getattr(ours, name) == getattr(theirs, name), (precision, name)
        assert [ours.allowed_changes(n) for n in (1, 99, 100, 1000)] == [
            theirs.allowed_changes(n) for n in (1, 99, 100, 1000)
        ]


def test_a_bundle_brings_its_own_limits(on_cpu):
    stored = {"relative": 0.01, "classes": 0.1, "classes_of_few": 2, "box_iou_median": 0.9, "box_iou_p1": 0.5}
    whole = replace(on_cpu.manifest, parity={"tolerances": {**stored, "chain_boxes": False, "outliers": 0.1}})
    assert Limits.of(whole).relative == 0.01
    assert Limits.of(whole).allowed_changes(5) == 2
    for strange in (stored, {**stored, "chain_boxes": "no"}, {**stored, "chain_boxes": True, "relative": -1}, 7):
        assert Limits.of(replace(on_cpu.manifest, parity={"tolerances": strange})).relative == 1e-4
    half = {name: {"type": "fp16"} for name in on_cpu.manifest.precision}
    assert Limits.of(replace(on_cpu.manifest, precision=half)).relative == 5e-2
    assert Limits.of(replace(on_cpu.manifest, precision={**half, "expert_1": {"type": "int8"}})).relative == 1.0


def test_ties_are_excused_and_one_box_of_few(on_cpu, frames):
    with closing(on_cpu.open(True)) as opened:
        reference = run_all(opened, frames, compared_tensors(on_cpu.manifest), 8)
    limits = LIMITS["fp32"]
    found = {name: array.copy() for name, array in reference.items()}
    best, other = np.argsort(reference["logits"][0])[::-1][:2]
    reference["logits"][0, other] = reference["logits"][0, best] * (1 - 1e-5)
    found["logits"][0] = reference["logits"][0]
    found["logits"][0, other] = reference["logits"][0, best] * (1 + 1e-5)
    compared = compare(found, reference, on_cpu.manifest, limits)
    assert (compared.failures, compared.numbers["class_changes_on_ties"]) == ([], 1)
    for image, expected in ((0, 0), (1, 1)):
        found["box_1"][image] = [0, 0, 4, 4]
        failures = [line for line in compare(found, reference, on_cpu.manifest, limits).failures if "box_1" in line]
        assert len(failures) == expected, failures


def test_boxes_are_compared_in_pixels_of_the_frame(on_cpu):
    names = compared_tensors(on_cpu.manifest)
    shapes = {"gate": 3, "box_1": 4, "box_2": 4}
    reference = {name: np.ones((1, shapes.get(name, 5)), np.float32) for name in names}
    reference["box_1"][0], reference["box_2"][0] = [0, 0, 16, 16], [0, 0, 32, 32]
    found = {name: array.copy() for name, array in reference.items()}
    found["box_1"][0] = [0, 0, 16, 8]
    numbers = compare(found, reference, on_cpu.manifest, LIMITS["fp32"]).numbers
    assert numbers["box_1_iou_median"] == pytest.approx(0.5)
    # The second box covers all that the first left; what it saw reaches from the first pixel's centre to the last's.
    assert numbers["box_2_iou_median"] == pytest.approx((8 - 1) / (16 - 1))
    assert numbers["same_crops"] == 0
    assert "logits_relative" not in numbers


def test_drawn_pictures_are_the_same_every_time_and_differ(on_cpu):
    first, second = (drawn_frames(on_cpu.manifest.preprocess).frames for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len({frame.tobytes() for frame in first}) == len(first)
