"""The field guide: a fine-grained data set of drawn birds that needs no download and knows its deciding parts.

A species is a hood, an eye ring and a beak, and nothing else: everything that decides lies on the head. Pose, size,
place, plumage, wing bars, perch, background, light and noise are drawn from the same ranges for every species.

field_guide.json                    version, seed, size, counts, species
train/parts.csv                     path,x0,y0,x1,y1 (path below `train`, pixels, half-open)
train/black-hooded-plain-eyed-warbler/00000.png
val/..., test/...
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from mge.data.drawing import Color, Plate, Species, draw_plate
from mge.parts import write_parts
from mge_runtime.errors import InputError, OutputError

VERSION = 1  # of the drawing: an image of another version may differ
SPLITS = ("train", "val", "test")
_DESCRIPTION = "field_guide.json"
_CHUNK = 50  # images that a worker draws in one go
# The names become folder names.
_HOODS: tuple[tuple[str, Color], ...] = (
    ("black", (26, 24, 28)),
    ("rufous", (186, 68, 28)),
    ("golden", (240, 196, 40)),
    ("azure", (44, 112, 206)),
)
_RINGS: tuple[tuple[str, Color | None], ...] = (
    ("plain", None),
    ("white", (255, 255, 250)),
    ("scarlet", (226, 32, 40)),
)
_BEAKS: tuple[str, ...] = ("warbler", "finch", "creeper")
_MAX_SPECIES = len(_HOODS) * len(_RINGS) * len(_BEAKS)


@lru_cache
def list_species(count: int) -> tuple[Species, ...]:
    """The first `count` species of the guide, sorted by name as an image folder numbers its classes.

    The first twelve are warblers, every hood with every ring: look-alikes in threes that differ in the eye ring alone
    and in fours that differ in the hood alone. The next twelve are finches, the last twelve creepers.
    """
    every = [
        Species(f"{hood}-hooded-{ring}-eyed-{beak}", hood_color, ring_color, beak)
        for beak in _BEAKS
        for hood, hood_color in _HOODS
        for ring, ring_color in _RINGS
    ]
    return tuple(sorted(every[:count], key=lambda one: one.name))


@dataclass(frozen=True)
class FieldGuide:
    """What determines every byte of a field guide.

    Raises:
        InputError: a field lies outside its range.
    """

    seed: int = 0  # >= 0
    species: int = 12  # 2..36
    size: int = 128  # pixels, the side of every image; >= 32
    train: int = 1800  # images in each split, > 0
    val: int = 300
    test: int = 600

    def __post_init__(self) -> None:
        ranges = [
            ("seed", self.seed >= 0, "0 or more"),
            ("species", 2 <= self.species <= _MAX_SPECIES, f"2 to {_MAX_SPECIES}"),
            ("size", self.size >= 32, "at least 32 pixels"),
            *((split, self.count(split) >= 1, "at least 1 image") for split in SPLITS),
        ]
        for name, good, expected in ranges:
            if not good:
                raise InputError(f"found {name} {getattr(self, name)}, expected {expected}; choose another number")

    def count(self, split: str) -> int:
        """Number of images in a split."""
        return int(getattr(self, split))

    def path(self, index: int) -> str:
        """Where image `index` lies below its split's folder; classes take turns."""
        return f"{list_species(self.species)[index % self.species].name}/{index:05d}.png"


def draw_image(guide: FieldGuide, split: str, index: int) -> Plate:
    """Draw image `index` of a split; it depends on seed, size, split, index and number of species, on nothing else.

    The scene depends on the first four alone, so an image's surroundings know nothing about its species.
    """
    rng = np.random.default_rng([guide.seed, SPLITS.index(split), index])
    return draw_plate(rng, list_species(guide.species)[index % guide.species], guide.size)


def write_field_guide(
    folder: str | os.PathLike[str],
    guide: FieldGuide,
    *,
    workers: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> bool:
    """Draw the guide into `folder`, which appears whole or not at all; return False if that guide is there already.

    Args:
        folder: a new folder in one that exists or can be made.
        guide: what to draw.
        workers: processes that draw; more than one start with `spawn`, so the calling script needs a `__main__` guard.
        progress: called with the number of images drawn so far.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
    """
    target = Path(folder)
    if _is_there(target, guide):
        return False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as place:
            draft = Path(place) / "guide"
            _fill(draft, guide, workers, progress)
            draft.rename(target)
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror or error}; expected a writable place, name another"
        ) from error
    return True


def _is_there(target: Path, guide: FieldGuide) -> bool:
    """Whether `target` holds this very guide; False if it does not exist."""
    try:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return False
        found = json.loads((target / _DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"cannot write {target}: found something that is no field guide, expected a new folder; name another place"
        ) from error
    if found != _describe(guide):
        raise OutputError(
            f"cannot write {target}: found a field guide drawn with other settings (see {_DESCRIPTION}), expected a "
            "new folder; name another place or remove that one"
        )
    missing = [s for s in SPLITS if not (target / s / guide.path(guide.count(s) - 1)).is_file()]
    if missing:
        raise OutputError(f"{target} lacks images of {missing[0]}; remove the folder and draw it again")
    return True


def _describe(guide: FieldGuide) -> dict[str, object]:
    return {"version": VERSION, **asdict(guide), "classes": [one.name for one in list_species(guide.species)]}


def _fill(draft: Path, guide: FieldGuide, workers: int, progress: Callable[[int], None]) -> None:
    for split in SPLITS:
        for index in range(min(guide.species, guide.count(split))):
            (draft / split / guide.path(index)).parent.mkdir(parents=True)
    tasks = [(split, index) for split in SPLITS for index in range(guide.count(split))]
    boxes: dict[str, dict[str, tuple[int, int, int, int]]] = {split: {} for split in SPLITS}
    draw = partial(_draw, draft, guide)
    with ExitStack() as stack:
        drawn = map(draw, tasks)
        if workers > 1:
            # Not fork: the caller may hold threads (torch does), and a forked child inherits their locks.
            pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_ignore_interrupt)
            stack.callback(pool.shutdown, cancel_futures=True)
            drawn = pool.map(draw, tasks, chunksize=_CHUNK)
        for done, ((split, index), part) in enumerate(zip(tasks, drawn, strict=True), 1):
            boxes[split][guide.path(index)] = part
            progress(done)
    for split in SPLITS:
        write_parts(draft / split, boxes[split])
    (draft / _DESCRIPTION).write_text(json.dumps(_describe(guide), indent=2) + "\n", encoding="utf-8")


def _ignore_interrupt() -> None:
    """Leave Ctrl-C to the parent, which cleans up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _draw(draft: Path, guide: FieldGuide, task: tuple[str, int]) -> tuple[int, int, int, int]:
    split, index = task
    plate = draw_image(guide, split, index)
    # Noise hardly compresses: level 1 is three times as fast as the default for the same bytes.
    Image.fromarray(plate.image).save(draft / split / guide.path(index), compress_level=1)
    return plate.part
