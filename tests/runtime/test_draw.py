"""A drawn prediction shows what it says, whatever the image's shape."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mge_runtime import fonts
from mge_runtime.draw import Canvas, blend_heatmap, draw_prediction, expert_color, fitted, shortened
from mge_runtime.prediction import Prediction

NAMES = tuple(f"Extraordinarily-Long-Name-Of-A-Class-{index:03}" for index in range(7))


def prediction_of(image, experts=3, gate=True, boxes=None, names=NAMES):
    """Make a prediction with nested boxes and a heat map with one peak."""
    rng = np.random.default_rng(experts)
    height, width = image.shape[:2]
    side = 0.8 * min(height, width)
    first = np.array([(width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2])
    shrink = 0.12 * side * np.array([1, 1, -1, -1])
    boxes = np.stack([first + k * shrink for k in range(experts)]) if boxes is None else np.asarray(boxes)
    return Prediction(
        rng.normal(size=len(names)).astype(np.float32),
        class_names=names,
        expert_logits=rng.normal(size=(experts, len(names))).astype(np.float32),
        gate=rng.dirichlet(np.ones(experts)).astype(np.float32) if gate else None,
        boxes=boxes.astype(np.float32),
        heatmaps=tuple(rng.random((7, 7), np.float32) for _ in range(experts)),
        width=width,
        height=height,
        timings_ms={"total": 1.0},
    )


def gray(height, width):
    return np.full((height, width, 3), 128, np.uint8)


def count(drawn, color):
    return int((np.asarray(drawn) == color).all(-1).sum())


@pytest.mark.parametrize(
    ("shape", "experts", "size"),
    [
        ((400, 600), 3, (1272, 849)),  # landscape: thumbnails below
        ((600, 400), 3, (1005, 848)),  # portrait: everything beside
        ((500, 500), 6, (1272, 848)),
        ((40, 600), 2, (1272, 640)),
        ((400, 600), 1, (1272, 841)),
        ((1, 1), 4, (1272, 848)),
        ((900, 1), 3, (473, 848)),
    ],
)
def test_every_shape_and_number_of_experts_gives_a_slide(shape, experts, size):
    image = gray(*shape)
    image.flags.writeable = False
    drawn = draw_prediction(image, prediction_of(image, experts, gate=experts > 1))
    assert drawn.mode == "RGB"
    np.testing.assert_allclose(drawn.size, size, atol=20)
    for k in range(6):  # the gate's bar and two frames of each expert, at least
        found = count(drawn, expert_color(k))
        assert found > 500 if k < experts else found == 0


def boxed(boxes):
    """The image with its boxes, drawn twice as large."""
    image = gray(400, 400)
    return np.asarray(draw_prediction(image, prediction_of(image, boxes=boxes)))[24:824, 24:824]


def test_boxes_lie_where_the_prediction_says():
    orange = (boxed([[0, 0, 400, 400], [100, 50, 300, 200], [150] * 4]) == expert_color(1)).all(-1)
    orange[:100] = False  # the label, above the box
    columns, rows = np.flatnonzero(orange.any(0)), np.flatnonzero(orange.sum(1) > 200)
    np.testing.assert_allclose([columns[0], columns[-1], rows[0], rows[-1]], [200, 599, 100, 399], atol=1)
    assert not orange[120:380, 220:580].any()


def test_equal_boxes_all_show():
    line = boxed([[0, 0, 400, 400], *[[100, 100, 300, 300]] * 2])[400, 190:230]  # across the left edge
    for k in (1, 2):
        assert (line == expert_color(k)).all(-1).sum() >= 2


def test_bars_are_as_long_as_their_shares():
    image = gray(600, 300)
    prediction = prediction_of(image)
    column = np.asarray(draw_prediction(image, prediction))[:, 24 + 400 + 24 :]
    for k, share in enumerate(prediction.gate):
        longest = (column[: column.shape[0] // 2] == expert_color(k)).all(-1).sum(1).max()
        assert longest == pytest.approx((400 - 84 - 64) * share, abs=1)


def test_the_heat_map_peaks_where_the_attention_does():
    heatmap = np.zeros((7, 7), np.float32)
    heatmap[1, 5] = 3
    blended = np.asarray(blend_heatmap(Image.new("RGB", (61, 61), (128, 128, 128)), heatmap)).astype(int)
    y, x = np.unravel_index(blended.sum(-1).argmax(), (61, 61))
    assert (y, x) == (10, 50)  # corners on corners: cell c of 7 lies at c * 60 / 6
    assert blended[40, 20].sum() < blended[10, 50].sum() / 2


@pytest.mark.parametrize("heatmap", [np.zeros((7, 7)), np.full((4, 4), np.nan), np.ones((1, 1)), -np.eye(3)])
def test_flat_and_odd_heat_maps(heatmap):
    assert blend_heatmap(Image.new("RGB", (20, 30), (128, 128, 128)), heatmap).size == (20, 30)


def test_text_is_shortened_in_the_middle():
    assert shortened("short", 15, 500) == "short"
    short = shortened(NAMES[3], 15, 150)
    assert short.startswith("Extra")
    assert short.endswith("003")
    assert "…" in short
    assert shortened(NAMES[3], 15, 1) == "…"


def test_no_text_runs_out_of_its_column():
    image = gray(600, 300)
    names = tuple(f"{'W' * 60} {index}" for index in range(5))
    drawn = np.asarray(draw_prediction(image, prediction_of(image, names=names)))
    assert (drawn[:, -24:] == 255).all()
    assert (drawn[:, 424:448] == 255).all()  # between image and column


def test_a_tag_stays_inside_the_image():
    canvas = Canvas.blank(30, 12)  # smaller than the tag
    canvas.tag(np.array([0, 0, 30, 12]), "expert 2", (230, 159, 0), corner=1)
    assert canvas.image.size == (30, 12)


def test_the_image_stays_as_it_is_but_for_boxes():
    image = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
    drawn, scaled = np.asarray(draw_prediction(image, prediction_of(image))), np.asarray(fitted(image, 800))
    untouched = (drawn[24 : 24 + scaled.shape[0], 24 : 24 + scaled.shape[1]] == scaled).all(-1).mean()
    assert 0.9 < untouched < 1


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A machine with one font, DejaVu Sans: Latin, Greek, Cyrillic, Arabic and more, nothing of East Asia."""
    import matplotlib as mpl

    shutil.copy(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", tmp_path)
    (tmp_path / "Broken.ttf").write_text("no font")
    monkeypatch.setattr(fonts, "_FOLDERS", (Path("~nobody-of-that-name"), tmp_path, tmp_path / "missing"))
    caches = (fonts._installed, fonts._best, fonts._has)
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


@pytest.mark.usefixtures("installed")
def test_names_of_other_scripts_are_drawn_with_a_font_of_the_system():
    image = gray(200, 300)
    drawn = {}
    for text in ("Певчий дрозд", "Grünspecht", "κίσσα", "\U0010ffff" * 8):
        canvas = Canvas.blank(400, 40)
        canvas.text(0, 0, text, 26)
        drawn[text] = canvas.image.tobytes()
        assert (fonts.undrawable([text]) is None) == (text[0] != "\U0010ffff")
    assert len(set(drawn.values())) == 4
    for letters in ("дрозд", "ü", "ά"):  # no letter is the box of those that are missing
        font = fonts.font_for(letters, 20)
        assert bytes(font.getmask("\U0010ffff")) not in {bytes(font.getmask(letter)) for letter in letters}
    draw_prediction(image, prediction_of(image, names=("Певчий дрозд", "line\nbreak\x1b", "猫", "\u202e", "e")))
    assert fonts.font_for("plain", 15) is fonts._load(None, 15)


@pytest.mark.usefixtures("installed")
def test_what_no_font_draws_is_said_with_what_to_install():
    said = fonts.undrawable(["robin", "дрозд", "山雀 3", "𓅃"])
    assert said is not None
    assert said.startswith("no font here draws 山 雀 𓅃, so ")
    assert "the packages fonts-noto-core and fonts-noto-cjk of Debian" in said
    assert fonts.undrawable(["robin", "дрозд"]) is None
