"""Files, folders, patterns and standard input become one list without surprises."""

import io
import os
from pathlib import Path

import pytest

from mge_runtime.errors import InputError
from mge_runtime.sources import find_images


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Make a folder of empty files (nothing is decoded here) and go there."""
    for name in (
        "photos/img10.jpg",
        "photos/img2.JPG",
        "photos/IMG1.png",
        "photos/notes.txt",
        "photos/answered.mge.png",
        "photos/.hidden.jpg",
        "photos/sub 2/b.webp",
        "photos/sub 10/a.tiff",
        "photos/.cache/c.jpg",
        "photos/phone.heic",
        "photos/[odd]*.jpg",
        "text/readme.md",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*arguments: str) -> list[str]:
    images, problems = find_images(arguments)
    assert problems == []
    return [image.name for image in images]


FOLDER = [
    "photos/[odd]*.jpg",
    "photos/IMG1.png",
    "photos/img2.JPG",
    "photos/img10.jpg",
    "photos/phone.heic",
    "photos/sub 2/b.webp",
    "photos/sub 10/a.tiff",
]


def test_a_folder_is_searched_deep_and_sorted_as_people_count(photos):
    assert sorted(names("photos")) == sorted(FOLDER)
    assert [name for name in names("photos") if "img" in name.lower()] == FOLDER[1:4]
    assert [name for name in names("photos") if "sub" in name] == FOLDER[5:]
    assert names(str(photos / "photos")) == [str(photos / name) for name in names("photos")]


@pytest.mark.usefixtures("photos")
def test_files_keep_their_order_whatever_their_suffix():
    chosen = ["photos/img10.jpg", "photos/notes.txt", "photos/.hidden.jpg", "photos/img2.JPG", "missing.jpg"]
    assert names(*chosen) == chosen


def test_an_image_is_taken_once(photos):
    assert names(
        "photos/img2.JPG", "./photos/img2.JPG", "photos/sub 2/../img2.JPG", str(photos / "photos/img2.JPG")
    ) == ["photos/img2.JPG"]
    assert names("photos/img10.jpg", "photos")[0] == "photos/img10.jpg"
    assert len(names("photos/img10.jpg", "photos", "photos/*.jpg")) == len(FOLDER)


def test_patterns_that_the_shell_left_alone(photos):
    assert names("photos/img*.*") == ["photos/img2.JPG", "photos/img10.jpg"]
    assert names("photos/**/*.webp") == ["photos/sub 2/b.webp"]
    assert names(str(photos / "*" / "img?.JPG")) == [str(photos / "photos/img2.JPG")]
    assert names("photos/sub*") == ["photos/sub 2/b.webp", "photos/sub 10/a.tiff"]


@pytest.mark.usefixtures("photos")
def test_a_file_whose_name_is_a_pattern_is_that_file():
    assert names("photos/[odd]*.jpg") == ["photos/[odd]*.jpg"]


def test_standard_input_is_one_image(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    images, problems = find_images(["-", "-"])
    assert problems == []
    assert [(image.name, image.path) for image in images] == [("standard input", None)]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"bytes")))
    assert images[0].source() == b"bytes"


@pytest.mark.usefixtures("photos")
def test_a_file_called_like_standard_input():
    Path("-").touch()
    images, _ = find_images(["./-"])
    assert images[0].path == Path("-")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("empty", "no image in the folder empty: it holds nothing; expected files such as .jpg or .png"),
        ("text", "no image in the folder text: it holds 1 other file; expected files such as .jpg or .png"),
        ("photos/*.gif", "no image matches photos/*.gif; expected a pattern such as 'photos/*.jpg', check the path"),
    ],
)
@pytest.mark.usefixtures("photos")
def test_nothing_found_is_one_line_and_the_rest_stays(argument, message):
    images, problems = find_images([argument, "photos/img2.JPG"])
    assert [str(problem) for problem in problems] == [message]
    assert isinstance(problems[0], InputError)
    assert [image.name for image in images] == ["photos/img2.JPG"]


def test_links_are_followed_but_not_in_circles(photos):
    (photos / "photos" / "sub 2" / "up").symlink_to(photos / "photos", target_is_directory=True)
    (photos / "linked").symlink_to(photos / "photos" / "sub 10", target_is_directory=True)
    assert len(names("photos")) == len(FOLDER)
    assert names("linked") == ["linked/a.tiff"]


def test_a_folder_that_may_not_be_read(photos, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub 2"):  # chmod would not stop root
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    _, problems = find_images([str(photos / "photos")])
    assert f"cannot list the folder {photos / 'photos' / 'sub 2'}: Permission denied" in str(problems[0])
