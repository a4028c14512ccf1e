"""Scenes in which a product must be found before it can be told apart, composed from photographs of single products.

    python -m benchmarks.scenes SHARED/data OUT --kind far                # val and test scenes as class folders
    python -m benchmarks.scenes SHARED/data OUT --train RUN --image-sizes 256,224,224 --source-size 1280 --resize 1280

`far`: one product tile at its own size (320 x 320 to 320 x 427 px) at a random place of a canvas of 1,280 px, which is
one enlarged photograph of something else. `shelf2` and `shelf3`: a grid of 2 x 2 or 3 x 3 tiles of 320 px, one of them
the product. Scenes of each split are made of that split's photographs; the validation's of training distractors that
training does not see. Everything follows from the seed. `parts.csv` says where the product lies.

With `--train` a model is trained on scenes that are new in every epoch and validated on those of OUT/val; what follows
are options of `mge-train`, which evaluates with `mge-eval --ckpt RUN/best.pt --data OUT`. Training sees whole
scenes, and so does evaluation where `--resize` is the side of the frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from PIL import Image

from mge.data.folder import TrainingDataset, crop_resized
from mge.parts import write_parts
from mge_runtime.cli.common import note, reports_errors
from mge_runtime.decode import open_image
from mge_runtime.preprocess import resized_size

CANVAS = 1280  # pixels, of far products
TILE = 320  # pixels, of shelves
KINDS = ("far", "shelf2", "shelf3")
COPIES = {"val": 2, "test": 2}  # scenes of each photograph
HELD_OUT = 8  # every eighth distractor of the training split is for validation

Box = tuple[int, int, int, int]


def compose(kind: str, product: Image.Image, others: Sequence[Path], random: np.random.Generator) -> tuple[Any, Box]:
    """Make a scene.

    Args:
        kind: "far", "shelf2" or "shelf3".
        product: RGB.
        others: photographs of anything else, to draw from.
        random: decides everything else.

    Returns:
        RGB uint8 [H, W, 3], and the product's box in it (x0, y0, x1, y1), half-open.
    """
    if kind == "far":
        scene = _square(_draw(others, random), CANVAS, random).copy()
        tile = np.asarray(product)
        x, y = (int(random.integers(CANVAS - side + 1)) for side in (tile.shape[1], tile.shape[0]))
    else:
        cells = int(kind[-1])
        scene = np.zeros((cells * TILE, cells * TILE, 3), np.uint8)
        for row in range(0, len(scene), TILE):
            for column in range(0, len(scene), TILE):
                scene[row : row + TILE, column : column + TILE] = _square(_draw(others, random), TILE, random)
        tile = _square(product, TILE, random)
        x, y = (int(random.integers(cells)) * TILE for _ in range(2))
    height, width = tile.shape[:2]
    scene[y : y + height, x : x + width] = tile
    return scene, (x, y, x + width, y + height)


def _draw(others: Sequence[Path], random: np.random.Generator) -> Image.Image:
    return open_image(others[int(random.integers(len(others)))])


def _square(image: Image.Image, side: int, random: np.random.Generator) -> np.ndarray:
    """The shorter side resized to `side`, a random square of it: uint8 [side, side, 3]."""
    width, height = resized_size(image.width, image.height, side)
    left, top = (int(random.integers(length - side + 1)) for length in (width, height))
    return crop_resized(image, (width, height), (left, top), side)


class SceneDataset(TrainingDataset):
    """Scenes for training: the same (epoch, index) always gives the same scene, every epoch another."""

    def __init__(self, *arguments: Any, kind: str, others: Sequence[Path], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kind, self._others = kind, others
        if self.config.resize != self.config.frame_size:
            note(
                f"validation sees no whole scenes, products at their borders are cut: --resize {self.config.frame_size}"
            )

    def read(self, key: tuple[int, int]) -> tuple[np.ndarray, int]:
        """The scene of image `index` in `epoch`, augmented."""
        path, label = self.samples[key[1]]
        random = np.random.default_rng((self._seed, *key))
        scene, _ = compose(self._kind, open_image(path, self._max_pixels), self._others, random)
        side = self.config.frame_size
        if len(scene) != side:
            scene = crop_resized(Image.fromarray(scene), (side, side), (0, 0), side)
        return self.augmented(scene, random), label


def distractors(data: Path, split: str) -> list[Path]:
    """Photographs that scenes of a split may show beside the product."""
    paths = sorted((data / "distractors" / ("test" if split == "test" else "train")).rglob("*.jpg"))
    if split == "test":
        return paths
    return [path for number, path in enumerate(paths) if (number % HELD_OUT == 0) is (split == "val")]


def write_scenes(data: Path, out: Path, kind: str, seed: int) -> None:
    """Write the scenes of validation and test as class folders with `parts.csv`; `train/` links the photographs.

    OUT appears when all of it is there.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        draft = Path(scratch, "scenes")
        draft.mkdir()
        (draft / "train").symlink_to((data / "groceries/train").resolve(), target_is_directory=True)
        for number, (split, copies) in enumerate(COPIES.items()):
            boxes: dict[str, tuple[float, float, float, float]] = {}
            others = distractors(data, split)
            for index, path in enumerate(sorted((data / "groceries" / split).rglob("*.jpg"))):
                (draft / split / path.parent.name).mkdir(parents=True, exist_ok=True)
                for copy in range(copies):
                    random = np.random.default_rng((seed, number, index, copy))
                    scene, box = compose(kind, open_image(path), others, random)
                    name = f"{path.parent.name}/{path.stem}-{copy}.jpg"
                    Image.fromarray(scene).save(draft / split / name, quality=95)
                    boxes[name] = box
            write_parts(draft / split, boxes)
            click.echo(f"{out / split}: {len(boxes)} scenes")
        draft.rename(out)


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True})
@click.argument("data", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--kind", type=click.Choice(KINDS), default="far", show_default=True)
@click.option("--scene-seed", default=0, show_default=True)
@click.option("--train", "run", type=click.Path(path_type=Path, file_okay=False), help="Folder of a run.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@reports_errors
def main(data: Path, out: Path, kind: str, scene_seed: int, run: Path | None, options: tuple[str, ...]) -> None:
    """Write scenes, or train on them."""
    if not out.exists():
        write_scenes(data, out, kind, scene_seed)
    if run is not None:
        from mge.cli.train import main as train

        scenes = partial(SceneDataset, kind=kind, others=distractors(data, "train"))
        code = train.main(["--data", str(out), "--out", str(run), *options], obj=scenes, standalone_mode=False)
        if code:  # it was stopped
            raise click.exceptions.Exit(code)


if __name__ == "__main__":
    main()
