"""What an INT8 export records of its images is what mge-calibrate keeps away from exits."""

from types import SimpleNamespace

import numpy as np
from PIL import Image

from mge_calibration.folder import list_labelled, short_digest
from mge_calibration.int8.images import read_calibration_images
from mge_calibration.int8.stage import Int8Options
from mge_calibration.parts import int8_digests
from mge_export.int8 import Int8Request
from mge_runtime.spec import Preprocess


def test_images_are_recorded_so_that_they_are_found_again(tmp_path):
    random = np.random.default_rng(0)
    for number in range(6):
        place = tmp_path / "ab"[number % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (40, 40, 3), np.uint8)).save(place / f"{number}.png")
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    preprocess = Preprocess(size=32, resize=36, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    images = read_calibration_images(tmp_path, preprocess, limit=0, seed=0, few=True)
    plan = {"type": "int8", "calibration": Int8Request(images, Int8Options()).to_dict()}
    found = int8_digests(SimpleNamespace(precision={"ingest": {"type": "fp32"}, "expert_1": plan}))
    listed = list_labelled(tmp_path, ("a", "b"))[1]
    assert found == {short_digest(image.sha256) for image in listed if "broken" not in image.name}
    assert len(found) == 6
