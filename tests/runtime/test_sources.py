"""Files, folders, patterns and standard input become one list without surprises."""

import io
import os
from pathlib import Path

import pytest

from mge_runtime.errors import InputError
from mge_runtime.sources import VALIDATION_FOLDERS, find_images, list_folder, list_labeled, validation_folder

LONG = "a" * 300


def touch(*paths):
    """Make empty files; nothing is decoded here."""
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working folder with the folders `photos`, `text` and `empty`."""
    monkeypatch.chdir(tmp_path)
    touch(*FOLDER, "photos/notes.txt", "photos/drawn.mge.png", "photos/.hidden.jpg", "photos/.cache/c.jpg")
    touch("text/readme.md")
    Path("empty").mkdir()
    return tmp_path


def names(*arguments):
    return [image.name for image in find_images(arguments).whole()]


FOLDER = [
    "photos/[odd]*.jpg",
    "photos/IMG1.png",
    "photos/img2.JPG",
    "photos/img10.jpg",
    "photos/phone.heic",
    "photos/sub 2/b.webp",
    "photos/sub 10/a.tiff",
]


def test_a_folder_is_searched_deep_and_sorted_as_people_count(here):
    assert sorted(names("photos")) == sorted(FOLDER)
    assert [name for name in names("photos") if "img" in name.lower()] == FOLDER[1:4]
    assert [name for name in names("photos") if "sub" in name] == FOLDER[5:]
    assert names(str(here / "photos")) == [str(here / name) for name in names("photos")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("photos/img10.jpg", "photos/notes.txt", "photos/.hidden.jpg", "missing.jpg"), None),  # in this order
        (("photos/[odd]*.jpg",), None),  # a file whose name is a pattern
        (("https://example.org/a.jpg?size=3",), None),  # no pattern
        (("photos/img2.JPG", "./photos/img2.JPG", "photos/sub 2/../img2.JPG"), ["photos/img2.JPG"]),  # taken once
        (("photos/img*.*",), ["photos/img2.JPG", "photos/img10.jpg"]),
        (("photos/**/*.webp",), ["photos/sub 2/b.webp"]),
        (("photos/sub*",), ["photos/sub 2/b.webp", "photos/sub 10/a.tiff"]),
    ],
)
def test_names_and_patterns(arguments, expected):
    assert names(*arguments) == (list(arguments) if expected is None else expected)


def test_names_that_overlap_and_absolute_patterns(here):
    assert names("photos/img10.jpg", "photos")[0] == "photos/img10.jpg"
    assert len(names("photos/img10.jpg", "photos", "photos/*.jpg")) == len(FOLDER)
    assert names("photos/img2.JPG", str(here / "photos/img2.JPG")) == ["photos/img2.JPG"]
    assert names(str(here / "*" / "img?.JPG")) == [str(here / "photos/img2.JPG")]
    touch("photos/album.jpg/1.png")  # a folder named like an image
    assert "photos/album.jpg/1.png" in names("photos")
    assert names("photos/album.jpg") == names("photos/album*") == ["photos/album.jpg/1.png"]


def test_standard_input_is_one_image(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"bytes")))
    (image,) = find_images(["-", "-"]).whole()
    assert (image.name, image.path.stem, image.source()) == ("standard input", "stdin", b"bytes")
    touch("-")
    assert find_images(["./-"]).images[0].path == Path("-")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("empty", "no image in the folder empty: it holds nothing; expected files such as .jpg or .png"),
        ("text", "no image in the folder text: passed over 1 file: 1 with another suffix; expected files such as"),
        ("photos/*.gif", "no image matches photos/*.gif; expected a pattern such as 'photos/*.jpg', check the path"),
        ("@none.txt", "cannot read the list none.txt: it does not exist; expected a list of image paths, one a line"),
        ("@photos", "cannot read the list photos: it is no regular file; expected a list"),
        ("@pipe", "it is no regular file"),
        (f"@{os.devnull}", "it is no regular file"),
        ("@text/readme.md", "names nothing; expected a list of image paths, one a line"),
        (f"photos/{LONG}/*.jpg", "no image matches"),
        (f"@{LONG}", "cannot read the list"),
    ],
)
def test_a_name_behind_which_there_is_nothing_costs_no_other_image(argument, message):
    os.mkfifo("pipe")
    found = find_images([argument, "photos/img2.JPG"])
    ((name, problem),) = found.problems
    assert isinstance(problem, InputError)
    assert message in str(problem)
    assert name == argument.removeprefix("@")
    assert [image.name for image in found.images] == ["photos/img2.JPG"]


def test_a_name_that_is_too_long_is_left_to_the_decoder():
    chosen = [f"{LONG}.jpg", f"{LONG}/b.jpg", "photos/img2.JPG"]
    assert names(*chosen) == chosen


def test_links_are_followed_but_not_in_circles(here):
    (here / "photos" / "sub 2" / "up").symlink_to(here / "photos", target_is_directory=True)
    (here / "linked").symlink_to(here / "photos" / "sub 10", target_is_directory=True)
    assert len(names("photos")) == len(FOLDER)
    assert names("linked") == ["linked/a.tiff"]


def close(monkeypatch, folder):
    """Make the folder one that may not be listed (chmod would not stop root)."""
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_a_folder_that_may_not_be_read_costs_no_other_image(here, monkeypatch):
    close(monkeypatch, here / "photos" / "sub 2")
    found = find_images([str(here / "photos")])
    assert len(found.images) == len(FOLDER) - 1
    assert [str(problem) for _, problem in found.problems] == [
        f"cannot list the folder {here / 'photos' / 'sub 2'}: Permission denied; expected one that may be read"
    ]
    with pytest.raises(InputError, match="cannot list the folder"):
        found.whole()


def test_what_is_passed_over_is_counted():
    os.mkfifo("photos/pipe.jpg")
    Path("photos/gone.jpg").symlink_to("nowhere")
    Path("photos/self.jpg").symlink_to("self.jpg")
    touch("photos/__MACOSX/img2.jpg")
    found = find_images(["photos", "photos/*.jpg"])
    assert found.note() == (
        "passed over 8 files: 2 a link to nothing, 1 a pipe, socket or device, 1 drawn by mge-run --save, 3 hidden, "
        "1 with another suffix"
    )
    # A pattern names what it matches; decoding says what is wrong with it.
    assert {image.name for image in found.images} - set(FOLDER) == {f"photos/{n}.jpg" for n in ("pipe", "gone", "self")}
    assert find_images(["photos/img2.JPG"]).note() is None
    with pytest.raises(InputError, match="no image in the folder empty: it holds nothing"):
        list_folder(Path("empty")).whole()


@pytest.mark.parametrize(
    "text", ["{}\n\n{}\n{}", "\ufeff{}\r\n{}\r\n{}\r\n", "{}\0{}\0{}\0"], ids=["unix", "windows", "nul"]
)
def test_lists_of_paths(text, monkeypatch):
    Path("list.txt").write_bytes(text.format("photos/img10.jpg", "photos/[odd]*.jpg", "photos/sub 2").encode())
    listed = ["photos/img10.jpg", "photos/[odd]*.jpg", "photos/sub 2/b.webp"]
    assert names("@list.txt") == listed
    found = find_images(["photos/IMG1.png"], "list.txt").whole()
    assert [image.name for image in found] == ["photos/IMG1.png", *listed]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("list.txt").read_bytes())))
    assert [image.name for image in find_images([], "-").whole()] == listed


def test_an_empty_name_is_not_the_working_folder():
    (problem,) = find_images(["", "photos/img2.JPG"]).problems
    assert "is a variable unset?" in str(problem[1])


def test_in_a_list_every_line_is_a_path():
    touch("-", "@at.jpg", "v\udcf6gel.jpg")
    Path("list.txt").write_bytes(b"-\n@at.jpg\nv\xf6gel.jpg\nmissing*.jpg\n")
    assert names("@list.txt") == ["-", "@at.jpg", "v\udcf6gel.jpg", "missing*.jpg"]
    assert names("@at.jpg") == ["@at.jpg"]  # there is such a file


# Labeled folders: the list that training, evaluation and calibration share.


@pytest.fixture
def train(tmp_path):
    """Two classes with hidden files, links and a loop."""
    train = tmp_path / "train"
    images = ("ant/1.JPG", "ant/sub/2.jpe", "bee/3.jfif", "bee/._3.jfif", "bee/.ipynb_checkpoints/3-checkpoint.jpg")
    touch(*(train / name for name in images), train / "parts.csv", tmp_path / "elsewhere" / "4.tif")
    for name in ("__MACOSX", ".git", "@eaDir"):
        (train / name).mkdir()
    (train / "bee" / "more").symlink_to(tmp_path / "elsewhere")
    (train / "bee" / "loop").symlink_to(train / "bee")
    return train


def test_labeled_images_follow_links_and_pass_over_what_is_hidden(train):
    said = []
    classes, samples = list_labeled(train, say=said.append)
    assert classes == ("ant", "bee")
    assert [(path.relative_to(train).as_posix(), label) for path, label in samples] == [
        ("ant/1.JPG", 0),
        ("ant/sub/2.jpe", 0),
        ("bee/3.jfif", 1),
        ("bee/more/4.tif", 1),
    ]
    assert said == [f"{train}: passed over 6 files: 5 hidden, 1 with another suffix"]


def test_labels_are_indices_of_the_classes_that_are_known(train):
    (train / "New Folder").mkdir()  # of no use, but no class either
    classes, samples = list_labeled(train, ("wasp", "bee", "ant"))
    assert classes == ("wasp", "bee", "ant")
    assert [label for _, label in samples] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda train: train.rename(train.with_name("other")), "no folder {}; expected a folder with labeled images"),
        (lambda train: touch(train / "new" / "a.txt"), "the class folder {}/new holds no image; expected at least one"),
        (lambda train: touch(train / "bee/v\udcf6gel.jpg"), r"the name of {}/bee/v\xf6gel.jpg is no text in UTF-8"),
        (lambda train: (train / "bee").rename(train / "caf\udce9"), r"the name of {}/caf\xe9"),
        (lambda train: touch(train / "loose.jpg"), "{}/loose.jpg lies in no class folder"),
    ],
    ids=["missing", "empty class", "file name", "class name", "loose"],
)
def test_a_labeled_folder_that_cannot_serve_is_one_line(train, spoil, message):
    spoil(train)
    with pytest.raises(InputError) as caught:
        list_labeled(train)
    assert message.format(train) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [".", "bee", "bee/more"])
def test_a_labeled_folder_that_may_not_be_read_is_one_line(train, monkeypatch, name):
    close(monkeypatch, train / name)
    with pytest.raises(InputError, match=f"cannot list the folder {train / name}: Permission denied"):
        list_labeled(train)


def test_validation_folders_by_any_of_their_names(tmp_path):
    assert validation_folder(tmp_path) is None
    for name in VALIDATION_FOLDERS:
        (tmp_path / name).mkdir()
        assert validation_folder(tmp_path) == tmp_path / name
        (tmp_path / name).rmdir()
    (tmp_path / "val").mkdir()
    (tmp_path / "valid").mkdir()
    with pytest.raises(InputError, match="holds val and valid; expected one folder"):
        validation_folder(tmp_path)
    assert validation_folder(Path(LONG)) is None
    with pytest.raises(InputError, match="no folder"):
        list_labeled(Path(LONG))
