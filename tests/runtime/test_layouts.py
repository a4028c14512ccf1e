"""Data sets as they are downloaded: what they are recognized as, their classes and their splits."""

import subprocess
import sys

import pytest
from torchvision.datasets import FGVCAircraft, Flowers102, Food101, OxfordIIITPet, StanfordCars

from mge_runtime.errors import InputError
from mge_runtime.layouts import find_list
from tests.helpers import layouts

TRAIN_TEST = {"train": "train", "test": "test"}
# The folder that torchvision downloads to, its class, its names of our splits, and its lists of paths and labels.
TORCHVISION = {
    "FGVC-Aircraft": (layouts.save_aircraft, "fgvc-aircraft-2013b", FGVCAircraft, TRAIN_TEST | {"val": "val"}),
    "Stanford Cars": (layouts.save_cars, "stanford_cars", StanfordCars, TRAIN_TEST),
    "Flowers-102": (layouts.save_flowers, "flowers-102", Flowers102, TRAIN_TEST | {"val": "val"}),
    "Oxford-IIIT Pets": (layouts.save_pets, "oxford-iiit-pet", OxfordIIITPet, {"train": "trainval", "test": "test"}),
    "Food-101": (layouts.save_food, "food-101", Food101, TRAIN_TEST),
}


@pytest.mark.parametrize("layout", TORCHVISION)
def test_lists_are_those_of_torchvision(tmp_path, layout, monkeypatch):
    save, folder, theirs, splits = TORCHVISION[layout]
    save(tmp_path / folder)
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda _: True)  # it knows the real files' digests
    found = find_list(tmp_path / folder)
    assert found.layout == layout
    assert list(found.splits) == [split for split in ("train", "val", "test") if split in splits]
    for split, name in splits.items():
        other = theirs(tmp_path, name)
        assert list(found.classes) == other.classes
        paths = next(vars(other)[name] for name in ("_image_files", "_images", "_samples") if hasattr(other, name))
        samples = paths if layout == "Stanford Cars" else zip(paths, other._labels, strict=True)
        assert found.splits[split] == sorted(
            ((type(tmp_path)(path), int(label)) for path, label in samples), key=lambda sample: sample[::-1]
        )
        assert all(path.is_file() for path, _ in found.splits[split])


def test_cub_says_which_images_are_for_training(tmp_path):
    layouts.save_cub(tmp_path)
    found = find_list(tmp_path)
    assert str(found) == f"{tmp_path} is CUB-200-2011: 2 classes, 10 train, 6 test images"
    assert found.classes == ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    path, label = found.splits["train"][0]
    assert (path.relative_to(tmp_path).as_posix(), label) == (
        "images/001.Black_footed_Albatross/Black_footed_Albatross_0000_796100.jpg",
        0,
    )
    assert [label for _, label in found.splits["test"]] == [0] * 3 + [1] * 3


def test_classes_of_nabirds_are_those_with_images_under_names_of_their_own(tmp_path):
    layouts.save_nabirds(tmp_path)
    found = find_list(tmp_path)
    assert found.layout == "NABirds"
    assert found.classes == ("Mallard (2)", "Oak Titmouse", "Mallard (900)")
    assert [(path.parent.name, label) for path, label in found.splits["train"]] == [
        *[("0002", 0)], *[("0817", 1)] * 2, *[("0900", 2)] * 2
    ]  # fmt: skip
    assert len(found.splits["test"]) == 1


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_names_paths_labels_and_splits(tmp_path, suffix):
    rows, file = layouts.table_rows(tmp_path), tmp_path / f"images{suffix}"
    if suffix == ".csv":
        layouts.save_csv(file, rows)
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    found = find_list(file)
    assert found.classes == ("cock", "tench")
    assert {split: len(samples) for split, samples in found.splits.items()} == {"train": 6, "val": 3, "test": 3}
    assert found.splits["test"] == [
        (tmp_path / "photos/11.png", 0), (tmp_path / "photos/9.png", 0), (tmp_path / "photos/10.png", 1)
    ]  # fmt: skip
    assert found.labeled("validation", ["tench", "x", "cock"])[0] == (tmp_path / "photos/7.png", 2)
    with pytest.raises(InputError, match=r"class 'cock', which is not among the model's 2 classes"):
        found.labeled("test", ["tench", "x"])
    with pytest.raises(InputError, match=r"without unseen images; expected a split that it has: .*/train"):
        found.labeled("unseen", found.classes)


def test_images_of_a_table_without_splits_stand_for_any(tmp_path):
    rows = [{"path": row["path"], "label": row["label"]} for row in layouts.table_rows(tmp_path)]
    layouts.save_csv(tmp_path / "images.csv", rows)
    found = find_list(tmp_path / "images.csv")
    said = []
    assert len(found.labeled("train", found.classes, said.append)) == 12
    assert said == []
    assert len(found.labeled("test", found.classes, said.append)) == 12
    assert "has no splits: a model trained on it has seen most of these images" in said.pop()
    layouts.save_csv(tmp_path / "images.csv", layouts.table_rows(tmp_path))
    for place in ("images.csv", "images.csv/test"):
        find_list(tmp_path / place).labeled("test", found.classes, said.append)
    assert said == []


def test_spaces_around_cells_mean_nothing(tmp_path):
    (tmp_path / "images.csv").write_text("path,label,split\na.jpg, hen, Train\n b.jpg ,hen ,train\nc.jpg,cock,val\n")
    found = find_list(tmp_path / "images.csv")
    assert found.classes == ("cock", "hen")
    assert found.splits == {
        "train": [(tmp_path / "a.jpg", 1), (tmp_path / "b.jpg", 1)], "val": [(tmp_path / "c.jpg", 0)]
    }  # fmt: skip


def test_an_image_counts_once_however_its_path_is_written(tmp_path):
    paths = ["x/a.jpg", "./x/a.jpg", "y/../x/a.jpg", tmp_path / "x/a.jpg", "b.jpg"]
    layouts.save_csv(tmp_path / "images.csv", [{"path": path, "label": str(path)[-5]} for path in paths])
    assert find_list(tmp_path / "images.csv").splits == {"": [(tmp_path / "x/a.jpg", 0), (tmp_path / "b.jpg", 1)]}


def test_a_split_is_named_like_a_folder(tmp_path):
    layouts.save_cub(tmp_path / "birds")
    layouts.save_csv(tmp_path / "images.csv", layouts.table_rows(tmp_path))
    assert len(find_list(tmp_path / "birds/test").labeled("any", find_list(tmp_path / "birds").classes)) == 6
    assert len(find_list(tmp_path / "images.csv/valid").splits[""]) == 3
    assert find_list(tmp_path / "birds/val") is None
    assert find_list(tmp_path / "birds/images") is None


def test_class_folders_are_no_list_whatever_lies_beside_them(tmp_path):
    layouts.save_cub(tmp_path)
    (tmp_path / "train").mkdir()
    assert find_list(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "images.csv",
            "file,class\na.jpg,b\n",
            r"images.csv, row 1: found .*; expected a value in each of the columns",
        ),
        ("images.csv", "path,label\na.jpg,b\nb.jpg\n", "images.csv, row 2: found"),
        ("images.csv", "path,label,split\na.jpg,b,\n", "images.csv, row 1: found"),
        ("images.csv", "path,label\na.jpg,b\n", "names 1 classes; expected at least two that differ"),
        ("images.csv", "path,label,split\na.jpg, ,train\n", "images.csv, row 1: found"),
        ("images.csv", "path,label\na.jpg,b\n./a.jpg,c\n", "names .*a.jpg as 'b' and as 'c'; expected one class"),
        ("images.csv", "path,label,split\na.jpg,b,train\nx/../a.jpg,b,test\n", "as train 'b' and as test 'b'"),
        ("images.csv", "", "names 0 classes"),
        ("images.csv", b"\xff\xfe", "its lists cannot be read: 'utf-8' codec"),
        ("images.parquet", "", "images.parquet"),
        (
            "birds/image_class_labels.txt",
            "1 1\n",
            "birds looks like CUB-200-2011, but its lists cannot be read: it names",
        ),
        ("birds/images.txt", "1\n", "birds looks like CUB-200-2011, but its lists cannot be read"),
    ],
)
def test_a_damaged_list_is_refused_in_one_line(tmp_path, file, content, message):
    layouts.save_cub(tmp_path / "birds")
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        find_list(tmp_path / file if "birds" not in file else tmp_path / "birds")


def test_lists_are_read_without_pytorch(tmp_path):
    layouts.save_flowers(tmp_path)
    program = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'torchvision'])\n"
        "from pathlib import Path; from mge_runtime.layouts import find_list; print(find_list(Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert "Flowers-102: 102 classes, 102 train, 102 val, 102 test images" in done.stdout
