"""Which labelled images there are, and how they are split and named."""

import shutil

import pytest

from mge_calibration.images import data_sha256, list_labeled, split_by_content
from mge_runtime.errors import InputError

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
    assert len(images) == 4
    assert data_sha256(images) == data_sha256(list_labeled(data, NAMES)[1])


def test_copies_count_once(data):
    shutil.copy(data / "ant" / "a.png", data / "ant" / "b.png")
    assert len(list_labeled(data, NAMES)[1]) == 4


def test_one_image_in_two_classes_is_refused(data):
    shutil.copy(data / "ant" / "a.png", data / "bee" / "b.png")
    with pytest.raises(InputError, match=r"ant/a\.png and bee/b\.png are the same bytes; expected it in the folder of"):
        list_labeled(data, NAMES)


def test_the_hash_is_that_of_names_and_contents(data):
    before = data_sha256(list_labeled(data, NAMES)[1])
    (data / "ant" / "a.png").write_bytes(b"other")
    changed = data_sha256(list_labeled(data, NAMES)[1])
    (data / "ant" / "a.png").rename(data / "ant" / "c.png")
    assert len({before, changed, data_sha256(list_labeled(data, NAMES)[1])}) == 3


def test_a_split_follows_content_and_seed_alone(data):
    for number in range(60):
        (data / "cow" / f"{number}.jpg").write_bytes(b"%d" % number)
    images = list_labeled(data, NAMES)[1]
    first, second = split_by_content(images, 1 / 3, seed=0)
    assert (len(first), len(second)) == (21, 43)
    assert {i.sha256 for i in first} | {i.sha256 for i in second} == {i.sha256 for i in images}
    (data / "cow").rename(data / "cows")
    renamed = list_labeled(data, ("ant", "bee", "cows"))[1]
    assert {i.sha256 for i in split_by_content(renamed[::-1], 1 / 3, seed=0)[0]} == {i.sha256 for i in first}
    assert {i.sha256 for i in split_by_content(images, 1 / 3, seed=1)[0]} != {i.sha256 for i in first}


def spoil_missing(data):
    shutil.rmtree(data)


def spoil_file(data):
    shutil.rmtree(data)
    data.write_text("a file")


def spoil_empty(data):
    for path in list(data.glob("*/*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def spoil_unlabelled(data):
    (data / "loose.jpg").write_bytes(b"loose")


def spoil_class(data):
    (data / "bee").rename(data / "wasp")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_missing, "no folder"),
        (spoil_file, "is a file; expected a folder"),
        (spoil_empty, "no image in the class folders"),
        (spoil_unlabelled, "lies in no class folder"),
        (spoil_class, "holds class 'wasp', which is not among the model's 3 classes"),
    ],
)
def test_a_folder_that_cannot_serve_is_refused(data, spoil, words):
    spoil(data)
    with pytest.raises(InputError) as caught:
        list_labeled(data, NAMES)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
