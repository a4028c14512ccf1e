"""Which labeled images there are, and which of them may set exits."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mge_calibration.images import choose_images, list_labeled, short_digest
from mge_runtime.errors import InputError
from tests.helpers.layouts import save_csv, table_rows

NAMES = ("ant", "bee", "cow")


@pytest.fixture
def data(tmp_path):
    """Files of distinct bytes; nothing here decodes them."""
    for name in ("bee/2.jpg", "bee/10.jpg", "ant/a.png", "cow/sub/deep.webp"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "data" / "parts.csv").write_text("no image")
    return tmp_path / "data"


def test_images_carry_the_class_of_their_folder(data):
    root, images = list_labeled(data, NAMES)
    assert root == data
    assert [(i.name, i.label) for i in images] == [
        ("ant/a.png", 0),
        ("bee/10.jpg", 1),
        ("bee/2.jpg", 1),
        ("cow/sub/deep.webp", 2),
    ]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_of_a_data_set_the_validation_part_is_taken(data, name):
    whole = data.with_name("whole")
    shutil.copytree(data, whole / name)
    shutil.copytree(data, whole / "train")
    root, images = list_labeled(whole, NAMES)
    assert root == whole / name
    assert [image.sha256 for image in images] == [image.sha256 for image in list_labeled(data, NAMES)[1]]


def test_copies_count_once_and_have_one_class(data):
    shutil.copy(data / "ant" / "a.png", data / "ant" / "b.png")
    assert len(list_labeled(data, NAMES)[1]) == 4
    shutil.copy(data / "ant" / "a.png", data / "bee" / "b.png")
    with pytest.raises(InputError, match=r"ant/a\.png and bee/b\.png are the same bytes; expected it in its own class"):
        list_labeled(data, NAMES)


def to_file(data):
    shutil.rmtree(data)
    data.write_text("a file")


def empty(data):
    for name in NAMES:
        shutil.rmtree(data / name)
        (data / name).mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no folder"),
        (to_file, "is a file; expected a folder"),
        (empty, "no image in the class folders"),
        (lambda data: (data / "loose.jpg").write_bytes(b"loose"), "lies in no class folder"),
        (lambda data: (data / "bee").rename(data / "wasp"), "'wasp', which is not among the model's 3 classes"),
    ],
    ids=["missing", "file", "empty", "no class", "other class"],
)  # fmt: skip
def test_a_folder_that_cannot_serve_is_refused(data, spoil, message):
    spoil(data)
    with pytest.raises(InputError, match=message) as caught:
        list_labeled(data, NAMES)
    assert "\n" not in str(caught.value)


@pytest.fixture
def manifest(tiny):
    return replace(tiny.make_manifest(tiny.make_graphs()), class_names=NAMES)


def make_images(folder, numbers, names=NAMES):
    for number in numbers:
        place = folder / names[number % len(names)]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(b"%d" % number)
    return folder


def test_images_that_set_temperatures_or_taught_int8_set_no_exits(tmp_path, manifest):
    data, apart = make_images(tmp_path / "data", range(10)), make_images(tmp_path / "apart", range(8, 30))
    digests = [short_digest(image.sha256) for image in list_labeled(apart, NAMES)[1]]
    said = []

    def choose(taught):
        plan = {"type": "fp16", "calibration": {"digests": taught}}
        return choose_images(data, apart, replace(manifest, precision={"expert_1": plan}), said.append)

    taught = [digest for digest in digests if digest not in {short_digest(i.sha256) for i in choose([]).fitting}][:5]
    chosen = choose(taught)
    assert (len(chosen.fitting), len(chosen.testing), len(chosen.known)) == (10, 15, 5)
    assert not chosen.known & {short_digest(image.sha256) for image in chosen.testing}
    assert said[-2:] == [
        f"2 of 22 images in {apart} are also in {data}: they set no exits",
        f"5 of 22 images in {apart} taught INT8: they set no exits",
    ]
    with pytest.raises(InputError, match="or taught INT8; exits need images other than"):
        choose(digests)
    with pytest.raises(InputError, match=r"is also in .*; exits need images other than those"):
        choose_images(data, data, manifest, said.append)


def test_validation_images_set_temperatures_but_exits_with_a_warning_alone(tmp_path, manifest):
    make_images(tmp_path / "birds" / "val", range(20))
    apart, said = make_images(tmp_path / "apart", range(20, 40)), []
    choose_images(tmp_path / "birds", apart, manifest, said.append)
    assert said == []
    choose_images(tmp_path / "birds", None, manifest, said.append)
    assert len(said) == 1
    assert said[0].startswith(
        f"exits are set by {tmp_path / 'birds' / 'val'}: if checkpoint or box thresholds were chosen"
    )


def test_most_classes_must_have_images(tmp_path, manifest):
    said, most = [], make_images(tmp_path / "most", range(9), NAMES[:2])
    choose_images(most, None, manifest, said.append)
    assert said[0].startswith(
        f"{most} has images of 2 of the bundle's 3 classes, none of cow: what is learned from them"
    )
    few = make_images(tmp_path / "few", range(9), NAMES[:1])
    with pytest.raises(InputError, match="of 1 of the bundle's 3 classes, none of bee, cow; expected at least half"):
        choose_images(few, None, manifest, said.append)


def test_a_list_calibrates_with_its_validation_split_or_the_one_that_is_named(tmp_path):
    rows = table_rows(tmp_path)
    save_csv(tmp_path / "images.csv", rows)
    root, images = list_labeled(tmp_path / "images.csv", ["tench", "hen", "cock"])
    assert root == tmp_path / "images.csv/val"
    assert [(image.name, image.label) for image in images] == [
        ("photos/7.png", 2), ("photos/6.png", 0), ("photos/8.png", 0)
    ]  # fmt: skip
    said = []
    names = ("tench", "cock")
    manifest = SimpleNamespace(class_names=names, graphs=[None, None], precision={})
    chosen = choose_images(tmp_path / "images.csv", tmp_path / "images.csv/test", manifest, said.append)
    assert [image.name for image in chosen.testing] == ["photos/11.png", "photos/9.png", "photos/10.png"]
    assert not any("exits are set by" in line for line in said)
    choose_images(tmp_path / "images.csv", None, manifest, said.append)
    assert "exits are set by" in said[-1]
    save_csv(tmp_path / "whole.csv", [{"path": row["path"], "label": row["label"]} for row in rows])
    list_labeled(tmp_path / "whole.csv", names, said.append)
    assert "whole.csv has no splits" in said[-1]
    save_csv(tmp_path / "images.csv", rows[:6])
    with pytest.raises(InputError, match=r"without val images; expected a split that it has: .*images\.csv/train"):
        list_labeled(tmp_path / "images.csv", names)
