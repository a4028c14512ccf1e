"""Files, folders, patterns and standard input become one list without surprises."""

import io
import os
from pathlib import Path

import pytest

from mge_runtime.errors import InputError
from mge_runtime.sources import VALIDATION_FOLDERS, find_images, list_folder, list_labelled, validation_folder


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
    images = find_images(["-", "-"]).whole()
    assert [(image.name, image.path) for image in images] == [("standard input", None)]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"bytes")))
    assert images[0].source() == b"bytes"


@pytest.mark.usefixtures("photos")
def test_a_file_called_like_standard_input():
    Path("-").touch()
    assert find_images(["./-"]).images[0].path == Path("-")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("empty", "no image in the folder empty: it holds nothing; expected files such as .jpg or .png"),
        (
            "text",
            "no image in the folder text: passed over 1 file: 1 with another suffix; "
            "expected files such as .jpg or .png",
        ),
        ("photos/*.gif", "no image matches photos/*.gif; expected a pattern such as 'photos/*.jpg', check the path"),
    ],
)
@pytest.mark.usefixtures("photos")
def test_nothing_found_is_one_line_and_the_rest_stays(argument, message):
    found = find_images([argument, "photos/img2.JPG"])
    assert [str(problem) for problem in found.problems] == [message]
    assert isinstance(found.problems[0], InputError)
    assert [image.name for image in found.images] == ["photos/img2.JPG"]


def test_links_are_followed_but_not_in_circles(photos):
    (photos / "photos" / "sub 2" / "up").symlink_to(photos / "photos", target_is_directory=True)
    (photos / "linked").symlink_to(photos / "photos" / "sub 10", target_is_directory=True)
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


def test_a_folder_that_may_not_be_read_costs_no_other_image(photos, monkeypatch):
    close(monkeypatch, photos / "photos" / "sub 2")
    found = find_images([str(photos / "photos")])
    assert len(found.images) == len(FOLDER) - 1
    assert [str(problem) for problem in found.problems] == [
        f"cannot list the folder {photos / 'photos' / 'sub 2'}: Permission denied; expected one that may be read"
    ]
    with pytest.raises(InputError, match="cannot list the folder"):
        found.whole()


@pytest.mark.usefixtures("photos")
def test_what_is_passed_over_is_counted():
    os.mkfifo("photos/pipe.jpg")
    Path("photos/gone.jpg").symlink_to("nowhere")
    Path("photos/self.jpg").symlink_to("self.jpg")
    Path("photos/__MACOSX").mkdir()
    Path("photos/__MACOSX/img2.jpg").touch()
    found = find_images(["photos", "photos/*.jpg"])
    assert found.remark() == (
        "passed over 8 files: 2 a link to nothing, 1 a pipe, socket or device, 1 drawn by mge-run --save, 3 hidden, "
        "1 with another suffix"
    )
    # A pattern names what it matches; decoding says what is wrong with it.
    assert {image.name for image in found.images} - set(FOLDER) == {f"photos/{n}.jpg" for n in ("pipe", "gone", "self")}
    assert find_images(["photos/img2.JPG"]).remark() is None
    with pytest.raises(InputError, match="no image in the folder empty: it holds nothing"):
        list_folder(Path("empty")).whole()


@pytest.mark.usefixtures("photos")
def test_a_folder_named_like_an_image_is_a_folder():
    Path("photos/album.jpg").mkdir()
    Path("photos/album.jpg/1.png").touch()
    assert "photos/album.jpg/1.png" in names("photos")
    assert names("photos/album.jpg") == names("photos/album*") == ["photos/album.jpg/1.png"]


@pytest.mark.parametrize(
    "text", ["{}\n\n{}\n{}", "\ufeff{}\r\n{}\r\n{}\r\n", "{}\0{}\0{}\0"], ids=["unix", "windows", "nul"]
)
@pytest.mark.usefixtures("photos")
def test_lists_of_paths(text, monkeypatch):
    Path("list.txt").write_bytes(text.format("photos/img10.jpg", "photos/[odd]*.jpg", "photos/sub 2").encode())
    listed = ["photos/img10.jpg", "photos/[odd]*.jpg", "photos/sub 2/b.webp"]
    assert names("@list.txt") == listed
    assert [image.name for image in find_images(["photos/IMG1.png"], "list.txt").whole()] == [
        "photos/IMG1.png",
        *listed,
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("list.txt").read_bytes())))
    assert [image.name for image in find_images([], "-").whole()] == listed


@pytest.mark.usefixtures("photos")
def test_in_a_list_every_line_is_a_path():
    for name in ("-", "@at.jpg", "v\udcf6gel.jpg"):
        Path(name).touch()
    Path("list.txt").write_bytes(b"-\n@at.jpg\nv\xf6gel.jpg\nmissing*.jpg\n")
    assert names("@list.txt") == ["-", "@at.jpg", "v\udcf6gel.jpg", "missing*.jpg"]
    assert names("@at.jpg") == ["@at.jpg"]  # there is such a file


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("none.txt", "it does not exist"),
        ("photos", "it is no regular file"),
        ("pipe", "it is no regular file"),
        (os.devnull, "it is no regular file"),
        ("text/readme.md", "names nothing"),
    ],
)
@pytest.mark.usefixtures("photos")
def test_a_list_that_cannot_be_read_costs_no_other_image(place, found):
    os.mkfifo("pipe")
    listed = find_images([f"@{place}", "photos/img2.JPG"])
    assert [image.name for image in listed.images] == ["photos/img2.JPG"]
    assert found in str(listed.problems[0])
    assert "expected a list of image paths, one a line" in str(listed.problems[0])
    with pytest.raises(InputError, match=found):
        find_images([], place).whole()


LONG = "a" * 300


@pytest.mark.parametrize("name", [LONG + ".jpg", f"photos/{LONG}/*.jpg", f"@{LONG}", f"{LONG}/b.jpg"])
@pytest.mark.usefixtures("photos")
def test_a_name_that_is_too_long_costs_no_other_image(name):
    listed = find_images([name, "photos/img2.JPG"])
    assert listed.images[-1].name == "photos/img2.JPG"
    assert len(listed.images) + len(listed.problems) == 2


def test_a_folder_whose_name_is_too_long_is_none():
    with pytest.raises(InputError, match="no folder"):
        list_labelled(Path(LONG))
    assert validation_folder(Path(LONG)) is None


def test_an_address_is_no_pattern():
    assert names("https://example.org/a.jpg?size=3") == ["https://example.org/a.jpg?size=3"]


# Labelled folders: the list that training, evaluation and calibration share.


@pytest.fixture
def data(tmp_path):
    for name in ("ant/1.JPG", "ant/sub/2.jpe", "bee/3.jfif", "bee/._3.jfif", "bee/.ipynb_checkpoints/3-checkpoint.jpg"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("__MACOSX", ".git", "@eaDir"):
        (tmp_path / "train" / name).mkdir()
    (tmp_path / "train" / "parts.csv").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "4.tif").touch()
    (tmp_path / "train" / "bee" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "bee" / "loop").symlink_to(tmp_path / "train" / "bee")
    return tmp_path


def test_labelled_images_follow_links_and_pass_over_what_is_hidden(data):
    said = []
    classes, samples = list_labelled(data / "train", say=said.append)
    assert classes == ("ant", "bee")
    assert [(path.relative_to(data / "train").as_posix(), label) for path, label in samples] == [
        ("ant/1.JPG", 0),
        ("ant/sub/2.jpe", 0),
        ("bee/3.jfif", 1),
        ("bee/more/4.tif", 1),
    ]
    assert said == [f"{data / 'train'}: passed over 6 files: 5 hidden, 1 with another suffix"]


def test_labels_are_indices_of_the_classes_that_are_known(data):
    (data / "train" / "New Folder").mkdir()  # of no use, but no class either
    classes, samples = list_labelled(data / "train", ("wasp", "bee", "ant"))
    assert classes == ("wasp", "bee", "ant")
    assert [label for _, label in samples] == [1, 1, 2, 2]


def spoil_empty_class(train):
    (train / "New Folder").mkdir()
    (train / "New Folder" / "notes.txt").touch()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda train: train.rename(train.with_name("other")), "no folder {}; expected a folder with labelled images"),
        (spoil_empty_class, "the class folder {}/New Folder holds no image; expected at least one"),
        (
            lambda train: (train / "bee" / "v\udcf6gel.jpg").touch(),
            r"the name of {}/bee/v\xf6gel.jpg is no text in UTF-8",
        ),
        (lambda train: (train / "bee").rename(train / "caf\udce9"), r"the name of {}/caf\xe9"),
        (lambda train: (train / "loose.jpg").touch(), "{}/loose.jpg lies in no class folder"),
    ],
    ids=["missing", "empty class", "file name", "class name", "loose"],
)
def test_a_labelled_folder_that_cannot_serve_is_one_line(data, spoil, words):
    spoil(data / "train")
    with pytest.raises(InputError) as caught:
        list_labelled(data / "train")
    assert words.format(data / "train") in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["train", "train/bee", "train/bee/more"])
def test_a_labelled_folder_that_may_not_be_read_is_one_line(data, monkeypatch, name):
    close(monkeypatch, data / name)
    with pytest.raises(InputError, match=f"cannot list the folder {data / name}: Permission denied"):
        list_labelled(data / "train")


@pytest.mark.parametrize("name", VALIDATION_FOLDERS)
def test_validation_folders_by_any_of_their_names(data, name):
    assert validation_folder(data) is None
    (data / name).mkdir()
    assert validation_folder(data) == data / name


def test_two_validation_folders_are_one_too_many(data):
    (data / "val").mkdir()
    (data / "valid").mkdir()
    with pytest.raises(InputError, match="holds val and valid; expected one folder"):
        validation_folder(data)
