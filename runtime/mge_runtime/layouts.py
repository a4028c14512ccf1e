"""Labeled images as they are downloaded: data sets with lists of their own, and tables of paths and labels.

Class folders need no list; `sources.list_labeled` reads them.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mge_runtime.errors import InputError, brief
from mge_runtime.sources import VALIDATION_FOLDERS, ImageList, NamedImage, is_folder, list_folder, require_folder

_TABLES = (".csv", ".parquet")

# What a reader returns: names of the classes in their order; by split, paths below the root with the name of the class.
_Lists = tuple[Sequence[str], Mapping[str, list[tuple[str, str]]]]


@dataclass(frozen=True)
class LabeledList:
    """The images of a data set by split; `str` says in one line what was found."""

    place: Path  # what the user named
    layout: str  # for people
    root: Path  # names of images are relative to it
    classes: tuple[str, ...]  # in the order of the data set
    # Path and class index, sorted by index and path. Splits are "train", "val", "test" and others that a table names;
    # or "" alone, whose images stand for every split.
    splits: Mapping[str, list[tuple[Path, int]]]

    def __str__(self) -> str:
        counts = ", ".join(f"{len(samples)} {split}".strip() for split, samples in self.splits.items())
        return f"{self.place} is {self.layout}: {len(self.classes)} classes, {counts} images"

    def labeled(
        self, split: str, classes: Sequence[str], say: Callable[[str], None] = lambda _: None
    ) -> list[tuple[Path, int]]:
        """The images of a split with their index in `classes`, which may be others and in another order.

        `say` is told where a table without splits stands for images that training should not have seen.

        Raises:
            InputError: there is no such split, or one of its images is of no class among them.
        """
        samples = self.splits.get(_split_name(split), self.splits.get(""))
        if not samples:
            raise InputError(
                f"{self.place} is {self.layout} without {split} images; expected a split that it has: "
                + ", ".join(str(self.place / name) for name in self.splits)
            )
        # A split that was named like a folder stands for every split, too; its name is no table's.
        if "" in self.splits and split != "train" and self.place.suffix.lower() in _TABLES:
            say(
                f"{self.place} has no splits: a model trained on it has seen most of these images; give the table a "
                "column split, or name images that training has not seen"
            )
        known = {name: index for index, name in enumerate(classes)}
        for path, label in samples:
            if self.classes[label] not in known:
                raise InputError(
                    f"{path} is of class {self.classes[label]!r}, which is not among the model's {len(known)} classes; "
                    f"expected names like theirs, such as {classes[0]!r}"
                )
        return [(path, known[self.classes[label]]) for path, label in samples]


def find_list(data: Path) -> LabeledList | None:
    """Read the lists of a data set, recognized by the files that mark its layout; None where there are none.

    A split can be named like a folder: `CUB_200_2011/test`, `images.csv/test`. A folder with `train/` in it is one of
    class folders, whatever lies beside that.

    Raises:
        InputError: a list is damaged, or names fewer than two classes or one twice.
    """
    whole = _find(data)
    if whole is not None or os.path.lexists(data):
        return whole
    whole, split = _find(data.parent), _split_name(data.name)
    if whole is None or split not in whole.splits:
        if data.suffix.lower() in _TABLES:
            raise InputError(f"no file {data}; expected a table of paths and labels: check the name")
        return None
    return replace(whole, place=data, splits={"": whole.splits[split]})


def require_images(data: Path, expected: str) -> LabeledList | None:
    """Refuse what is neither a list nor a folder; `expected` says what it should be. Returns the list, if it is one.

    Raises:
        InputError: it is neither, or a damaged list.
    """
    if (listed := find_list(data)) is None:
        require_folder(data, expected)
    return listed


def list_images(data: Path, split: str, expected: str) -> ImageList:
    """The images of a list's split in the order of their paths, or of a folder as `list_folder` finds them.

    Raises:
        InputError: as `require_images`, or the list has no such split.
    """
    if (listed := require_images(data, expected)) is None:
        return list_folder(data)
    paths = sorted(path for path, _ in listed.labeled(split, listed.classes))
    return ImageList([NamedImage(str(path), path) for path in paths])


def relative_name(path: Path, root: Path) -> str:
    """What an image is called: its path from the root of its data set, with "/"; a table may lead out of there."""
    return Path(os.path.relpath(path, root)).as_posix()


def _split_name(name: str) -> str:
    return "val" if name.lower() in VALIDATION_FOLDERS else name.lower()


def _find(data: Path) -> LabeledList | None:
    if data.suffix.lower() in _TABLES and os.path.isfile(data):  # noqa: PTH113 - Path raises where a folder is closed
        return _read(data, data.parent, "a table of paths and labels", _table)
    if is_folder(data) and not is_folder(data / "train"):
        for layout, marks, read in _LAYOUTS:
            if all((data / mark).is_file() for mark in marks):
                return _read(data, data, layout, read)
    return None


def _read(data: Path, root: Path, layout: str, read: Callable[[Path], _Lists]) -> LabeledList:
    try:
        names, listed = read(data)
        index = {name: number for number, name in enumerate(names)}
        splits = {
            split: sorted(((path, index[name]) for path, name in rows), key=lambda sample: sample[::-1])
            for split, rows in _once(data, root, listed).items()
        }
    except (InputError, ModuleNotFoundError):
        raise
    except Exception as error:  # damaged lists end in almost anything
        reason = f"it names {error}, and nowhere what that is" if isinstance(error, KeyError) else brief(error)
        raise InputError(
            f"{data} looks like {layout}, but its lists cannot be read: {reason}; expected whole files: unpack or "
            "write them again"
        ) from error
    twice = [name for name, count in Counter(names).items() if count > 1]
    if len(index) < 2 or twice:
        found = f"class {twice[0]!r} more than once" if twice else f"{len(index)} classes"
        raise InputError(f"{data} is {layout} and names {found}; expected at least two that differ")
    return LabeledList(data, layout, root, tuple(names), splits)


def _once(data: Path, root: Path, listed: Mapping[str, list[tuple[str, str]]]) -> dict[str, list[tuple[Path, str]]]:
    """Each image once, however its path is written: a copy would be in training and held out of it."""
    splits: dict[str, list[tuple[Path, str]]] = {split: [] for split in listed}
    known: dict[str, str] = {}  # by the path without detours, what is said of the image
    for split, rows in listed.items():
        for path, name in ((root / path, name) for path, name in rows):
            said, key = f"{split} {name!r}".strip(), os.path.normpath(path.absolute())
            if key not in known:
                known[key] = said
                splits[split].append((path, name))
            elif known[key] != said:
                raise InputError(
                    f"{data} names {path} as {known[key]} and as {said}; expected one class and one split of an image"
                )
    return splits


def _table(path: Path) -> _Lists:
    """A CSV or Parquet file with the columns path (below the file's folder), label and, if there are splits, split."""
    rows: list[dict[str, Any]]
    if path.suffix.lower() == ".parquet":
        try:
            rows = import_module("pyarrow.parquet").read_table(path).to_pylist()
        except ModuleNotFoundError as error:
            raise InputError(
                f"cannot read {path}: pyarrow is not installed; install it with pip, or write the table as .csv"
            ) from error
    else:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
    splits: dict[str, list[tuple[str, str]]] = {}
    for number, row in enumerate(rows, 1):
        cells = (row.get(name) for name in ("path", "label", "split"))
        image, label, split = ("" if cell is None else str(cell).strip() for cell in cells)
        if not image or not label or ("split" in row and not split):
            raise InputError(
                f"{path}, row {number}: found {str(row)[:200]}; expected a value in each of the columns path, label "
                "and, if the table has splits, split (train, val, test)"
            )
        splits.setdefault(_split_name(split), []).append((image, label))
    return sorted({label for rows in splits.values() for _, label in rows}), splits


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _pairs(path: Path) -> Iterator[list[str]]:
    """The first word of each line, and the rest of it."""
    return (line.split(maxsplit=1) for line in _lines(path))


def _matrix(path: Path, name: str) -> Any:
    """A variable of a MATLAB file, an array of at least one dimension."""
    return np.atleast_1d(import_module("scipy.io").loadmat(path, squeeze_me=True)[name])


def _birds(root: Path) -> _Lists:
    """Classes of NABirds are the nodes of its hierarchy that have images; two of one name get their numbers."""
    names, images, labels, training = (
        dict(_pairs(root / f"{name}.txt")) for name in ("classes", "images", "image_class_labels", "train_test_split")
    )
    used = set(labels.values())
    names = {number: name for number, name in names.items() if number in used}
    alike = Counter(names.values())
    names = {number: name if alike[name] == 1 else f"{name} ({number})" for number, name in names.items()}
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for image, path in images.items():
        splits["train" if training[image] == "1" else "test"].append((f"images/{path}", names[labels[image]]))
    return list(names.values()), splits


def _aircraft(root: Path) -> _Lists:
    data = root / "data"
    return _lines(data / "variants.txt"), {
        split: [(f"data/images/{image}.jpg", name) for image, name in _pairs(data / f"images_variant_{split}.txt")]
        for split in ("train", "val", "test")
    }


def _cars(root: Path) -> _Lists:
    """The labels of the test images are a file of their own, without which there are none."""
    names = [str(name) for name in _matrix(root / "devkit/cars_meta.mat", "class_names")]
    files = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    return names, {
        split: [
            (f"cars_{split}/{row['fname']}", names[int(row["class"]) - 1])
            for row in _matrix(root / file, "annotations")
        ]
        for split, file in files.items()
        if (root / file).is_file()
    }


def _flowers(root: Path) -> _Lists:
    labels = _matrix(root / "imagelabels.mat", "labels")
    splits = {"train": "trnid", "val": "valid", "test": "tstid"}
    return _FLOWERS, {
        split: [
            (f"jpg/image_{number:05d}.jpg", _FLOWERS[labels[number - 1] - 1])
            for number in _matrix(root / "setid.mat", name).tolist()
        ]
        for split, name in splits.items()
    }


def _pets(root: Path) -> _Lists:
    """Lines are the image, the number of its class, species and breed; the class has the image's name."""
    names: dict[int, str] = {}
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for split, file in (("train", "trainval"), ("test", "test")):
        for image, rest in _pairs(root / f"annotations/{file}.txt"):
            name = names.setdefault(int(rest.split()[0]), image.rpartition("_")[0].replace("_", " ").title())
            splits[split].append((f"images/{image}.jpg", name))
    return [names[number] for number in sorted(names)], splits


def _food(root: Path) -> _Lists:
    lists = {split: json.loads((root / f"meta/{split}.json").read_text("utf-8")) for split in ("train", "test")}
    return sorted(lists["train"]), {
        split: [(f"images/{image}.jpg", name) for name, images in classes.items() for image in images]
        for split, classes in lists.items()
    }


_BIRDS = ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
_LAYOUTS: tuple[tuple[str, tuple[str, ...], Callable[[Path], _Lists]], ...] = (
    ("NABirds", (*_BIRDS, "hierarchy.txt"), _birds),
    ("CUB-200-2011", _BIRDS, _birds),
    ("FGVC-Aircraft", ("data/variants.txt", "data/images_variant_train.txt"), _aircraft),
    ("Stanford Cars", ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat"), _cars),
    ("Flowers-102", ("imagelabels.mat", "setid.mat"), _flowers),
    ("Oxford-IIIT Pets", ("annotations/trainval.txt", "annotations/test.txt"), _pets),
    ("Food-101", ("meta/train.json", "meta/test.json"), _food),
)
# By number, as torchvision names them; the data set itself does not.
_FLOWERS = (
    """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid, bird
of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris, globe-flower,
purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red
ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william, carnation,
garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya, cape flower, great masterwort,
siam tulip, lenten rose, barbeton daisy, daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold,
buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff,
gaura, geranium, orange dahlia, pink-yellow dahlia?, cautleya spicata, japanese anemone, black-eyed susan, silverbush,
californian poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy, gazania, azalea, water lily,
rose, thorn apple, morning glory, passion flower, lotus, toad lily, anthurium, frangipani, clematis, hibiscus,
columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss,
foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
""".replace("\n", " ")
    .strip()
    .split(", ")
)
