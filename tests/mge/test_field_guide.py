import itertools
import json

import numpy as np
import pytest
from PIL import Image

from mge.cli.field_guide import draw_sheet, main
from mge.data.drawing import draw_plate
from mge.data.field_guide import SPLITS, FieldGuide, draw_image, list_species, write_field_guide
from mge.parts import read_parts
from mge_runtime.errors import InputError, OutputError
from tests.helpers.commands import fails, succeeds

SMALL = FieldGuide(seed=5, species=4, size=48, train=9, val=5, test=6)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_species_are_distinct_sorted_and_differ_in_marks():
    for count in (2, 12, 24, 36):
        species = list_species(count)
        names = [one.name for one in species]
        assert names == sorted(set(names))
        assert len({(one.hood, one.ring, one.beak) for one in species}) == count


def test_an_image_depends_neither_on_the_number_of_images_nor_on_their_order():
    short, long = FieldGuide(train=3, val=1, test=1, size=64), FieldGuide(train=5000, val=9, test=9, size=64)
    backwards = [draw_image(long, "train", index).image for index in (2, 1, 0)]
    forwards = [draw_image(short, "train", index).image for index in (0, 1, 2)]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))


def test_seed_split_and_index_each_change_the_scene():
    guide, other = FieldGuide(size=64), FieldGuide(size=64, seed=1)
    plates = [draw_image(guide, "train", 0), draw_image(other, "train", 0), draw_image(guide, "val", 0)]
    plates.append(draw_image(guide, "train", 12))  # the same species again
    for a, b in itertools.combinations(plates, 2):
        assert (a.image != b.image).mean() > 0.5


def test_one_scene_drawn_with_every_species_differs_in_the_part_alone():
    """So that nothing but the part tells the species."""
    species = list_species(36)
    for scene in range(4):
        plates = [draw_plate(np.random.default_rng([9, scene]), one, 128) for one in species]
        x0, y0, x1, y1 = plates[0].part
        outside = np.ones((128, 128), bool)
        outside[y0:y1, x0:x1] = False
        for plate in plates:
            assert plate.part == plates[0].part
            assert np.array_equal(plate.image[outside], plates[0].image[outside])
        for a, b in itertools.combinations(plates, 2):
            changed = np.abs(a.image.astype(int) - b.image)[y0:y1, x0:x1].max(axis=2) > 20
            assert changed.sum() >= 5  # pixels: small, but there


def test_part_is_a_small_box_inside_the_center_crop():
    guide = FieldGuide()
    boxes = np.array([draw_image(guide, "test", index).part for index in range(60)], float)
    assert boxes[:, :2].min() >= 128 / 16
    assert boxes[:, 2:].max() <= 128 * 15 / 16
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])) / 128
    assert sides.min() > 0.08
    assert sides.max() < 0.2
    # Both flanks of the image hold heads: the place varies.
    assert (np.ptp(boxes[:, :2], axis=0) > 64).all()


def test_folder_holds_images_boxes_and_how_it_was_made(tmp_path):
    seen = []
    assert write_field_guide(tmp_path / "guide", SMALL, progress=seen.append)
    assert seen == list(range(1, 21))
    told = json.loads((tmp_path / "guide" / "field_guide.json").read_text())
    assert (told["seed"], told["size"], told["version"]) == (5, 48, 1)
    for split in SPLITS:
        folder = tmp_path / "guide" / split
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == told["classes"]
        parts = read_parts(folder)
        assert parts is not None
        assert set(parts) == {p.relative_to(folder).as_posix() for p in folder.rglob("*.png")}
        assert len(parts) == SMALL.count(split)
        for index in range(SMALL.count(split)):
            plate = draw_image(SMALL, split, index)
            assert np.array_equal(np.asarray(Image.open(folder / SMALL.path(index))), plate.image)
            assert parts[SMALL.path(index)] == plate.part


def test_workers_write_the_same_bytes_as_one_process(tmp_path):
    write_field_guide(tmp_path / "one", SMALL)
    write_field_guide(tmp_path / "two", SMALL, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_same_guide_is_left_alone_and_anything_else_is_an_error(tmp_path):
    target = tmp_path / "guide"
    assert write_field_guide(target, SMALL)
    before = contents(target)
    assert not write_field_guide(target, SMALL)
    with pytest.raises(OutputError, match="other settings"):
        write_field_guide(target, FieldGuide(seed=6, species=4, size=48, train=9, val=5, test=6))
    assert contents(target) == before
    (target / "test" / SMALL.path(5)).unlink()
    with pytest.raises(OutputError, match="lacks images of test"):
        write_field_guide(target, SMALL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="no field guide"):
        write_field_guide(tmp_path / "other", SMALL)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_drawing_leaves_nothing(tmp_path, workers):
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_field_guide(tmp_path / "guide", SMALL, workers=workers, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place_and_impossible_guides_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_field_guide(tmp_path / "file" / "guide", SMALL)
    for wrong in ({"species": 37}, {"size": 16}, {"train": 0}, {"seed": -1}):
        with pytest.raises(InputError, match="expected"):
            FieldGuide(**wrong)


def test_sheet_shows_the_images_in_order():
    sheet = draw_sheet(FieldGuide(size=64), columns=3, rows=2, side=64)
    assert sheet.size == (3 * 70 + 6, 2 * 84 + 6)
    first = np.asarray(sheet)[6:70, 6:70]
    assert np.array_equal(first, draw_image(FieldGuide(size=64), "train", 0).image)


def test_command_draws_a_guide_and_a_sheet(tmp_path):
    counts = ["--train", "9", "--val", "5", "--test", "6"]
    options = ["--seed", "5", "--species", "4", "--size", "48", "--workers", "1", *counts]
    target, sheet = tmp_path / "guide", tmp_path / "sheet.png"
    assert "20 images of 4 species" in succeeds(main, target, *options, "--sheet", sheet).output
    write_field_guide(tmp_path / "same", SMALL)
    assert contents(target) == contents(tmp_path / "same")
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    assert "already there" in succeeds(main, target, *options).output


def test_command_prints_one_line_on_an_error(tmp_path):
    assert fails(main, tmp_path / "guide", "--species", 99).startswith("error: found species 99, expected 2 to 36")
    assert not list(tmp_path.iterdir())
