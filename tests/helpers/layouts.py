"""Downloaded data sets in miniature: the folders and lists of the real archives, around images of a few pixels."""

import csv
import json

import numpy as np
from PIL import Image
from scipy.io import savemat


def _draw(root, path, number):
    """An image of its own color and noise at a path below root."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / path)


def _write(root, path, lines):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text("".join(f"{line}\n" for line in lines))


def _birds(root, names, image_names, images):
    """The lists that CUB and NABirds share; images are (number of the class, path, is for training)."""
    rows = [(name, *image) for name, image in zip(image_names, images, strict=True)]
    for number, (_, _, path, _) in enumerate(rows):
        _draw(root, f"images/{path}", number)
    _write(root, "classes.txt", [f"{number} {name}" for number, name in names.items()])
    _write(root, "images.txt", [f"{name} {path}" for name, _, path, _ in rows])
    _write(root, "image_class_labels.txt", [f"{name} {label}" for name, label, _, _ in rows])
    _write(root, "train_test_split.txt", [f"{name} {train}" for name, _, _, train in rows])


def save_cub(root):
    names = {1: "001.Black_footed_Albatross", 2: "002.Laysan_Albatross"}
    images = [
        (label, f"{names[label]}/{names[label][4:]}_{number:04d}_{796100 + number}.jpg", int(number < 5))
        for label in names
        for number in range(8)
    ]
    _birds(root, names, range(1, 17), images)
    _write(root, "bounding_boxes.txt", [f"{number} 60.0 27.0 325.0 304.0" for number in range(1, 17)])


def save_nabirds(root):
    names = {0: "Birds", 1: "Ducks, Geese, and Swans", 2: "Mallard", 817: "Oak Titmouse", 900: "Mallard"}
    hashes = [f"{number:08x}-21dc-4d0c-bfe1-4cae3c85c82{number}" for number in range(6)]
    labels = [900, 817, 900, 817, 2, 2]
    images = [
        (label, f"{label:04d}/{name.replace('-', '')}.jpg", int(number < 4 or number == 5))
        for number, (name, label) in enumerate(zip(hashes, labels, strict=True))
    ]
    _birds(root, names, hashes, images)
    _write(root, "hierarchy.txt", ["1 0", "2 1", "817 0", "900 1"])


def save_aircraft(root):
    names = ["707-320", "Falcon 2000"]
    _write(root, "data/variants.txt", names)
    for split, start in (("train", 1025794), ("val", 1340192), ("test", 34309)):
        images = [(f"{start + number:07d}", names[number % 2]) for number in range(4)]
        _write(root, f"data/images_variant_{split}.txt", [f"{image} {name}" for image, name in images])
        for image, _ in images:
            _draw(root, f"data/images/{image}.jpg", int(image))


def save_cars(root):
    (root / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"], object)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    kinds = [(f"bbox_{corner}", np.uint8) for corner in ("x1", "y1", "x2", "y2")] + [("class", np.uint8)]
    for split, place in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.zeros(4, [*kinds, ("fname", object)])
        rows["class"], rows["fname"] = [2, 1, 2, 1], [f"{number:05d}.jpg" for number in range(1, 5)]
        savemat(root / place, {"annotations": rows})
        for number, name in enumerate(rows["fname"]):
            _draw(root, f"cars_{split}/{name}", number + 10 * (split == "test"))


def save_flowers(root):
    root.mkdir(parents=True, exist_ok=True)
    labels = np.tile(np.arange(1, 103), 3).astype(np.uint8)
    savemat(root / "imagelabels.mat", {"labels": labels})
    trnid, valid, tstid = np.arange(1, 307, dtype=np.uint16).reshape(3, 102)
    savemat(root / "setid.mat", {"trnid": trnid, "valid": valid, "tstid": tstid})
    for number in range(1, 307):
        _draw(root, f"jpg/image_{number:05d}.jpg", number)


def save_pets(root):
    names = ["Abyssinian", "english_cocker_spaniel"]
    for split, start in (("trainval", 1), ("test", 100)):
        rows = [(f"{name}_{start + n}", label) for label, name in enumerate(names, 1) for n in range(2)]
        _write(root, f"annotations/{split}.txt", [f"{image} {label} {label} 1" for image, label in rows])
        for number, (image, _) in enumerate(rows):
            _draw(root, f"images/{image}.jpg", start + number)
    _write(root, "annotations/list.txt", ["#Image CLASS-ID SPECIES BREED ID"])


def save_food(root):
    for split, start in (("train", 1), ("test", 500)):
        lists = {name: [f"{name}/{start + n}" for n in range(2)] for name in ("apple_pie", "baby_back_ribs")}
        _write(root, f"meta/{split}.json", [json.dumps(lists)])
        for number, image in enumerate(image for images in lists.values() for image in images):
            _draw(root, f"images/{image}.jpg", start + number)
    _write(root, "meta/classes.txt", ["apple_pie", "baby_back_ribs"])


def table_rows(root):
    """Rows of a table, with the images that they name."""
    rows = []
    for number in range(12):
        label, split = ("tench", "cock")[number % 2], ("train", "train", "Valid", "test")[number // 3]
        rows.append({"path": f"photos/{number}.png", "label": label, "split": split})
        _draw(root, rows[-1]["path"], number)
    return rows


def save_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as lines:
        table = csv.DictWriter(lines, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
