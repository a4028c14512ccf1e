"""The field guide on disk: an image folder per split, the boxes of the deciding parts, and how it was made.

field_guide.json                    version, seed, size, counts, species
train/parts.csv                     path,x0,y0,x1,y1 (path below `train`, pixels, half-open)
train/black-hooded-plain-eyed-warbler/00000.png
val/..., test/...
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from mge.data.field_guide.draw import Plate, draw_plate
from mge.data.field_guide.species import MAX_SPECIES, MIN_SPECIES, list_species
from mge.parts import write_parts
from mge_runtime.errors import InputError, OutputError

__all__ = ["SPLITS", "VERSION", "FieldGuide", "draw_image", "write_field_guide"]

VERSION = 1  # of the drawing: a picture of another version may differ
SPLITS = ("train", "val", "test")
_DESCRIPTION = "field_guide.json"
_CHUNK = 50  # pictures that a worker draws in one go


@dataclass(frozen=True)
class FieldGuide:
    """What determines every byte of a field guide."""

    seed: int = 0  # >= 0
    species: int = 12  # MIN_SPECIES..MAX_SPECIES
    size: int = 128  # pixels, the side of every picture; >= 32
    train: int = 1800  # pictures in each split, > 0
    val: int = 300
    test: int = 600

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: a field lies outside its range.
        """
        if not MIN_SPECIES <= self.species <= MAX_SPECIES:
            raise InputError(
                f"found {self.species} species, expected {MIN_SPECIES} to {MAX_SPECIES}; choose a number there"
            )
        if self.size < 32:
            raise InputError(f"found pictures of {self.size} pixels, expected at least 32; choose a larger size")
        if self.seed < 0:
            raise InputError(f"found seed {self.seed}, expected 0 or more; choose another seed")
        for split in SPLITS:
            if self.count(split) < 1:
                raise InputError(f"found {self.count(split)} pictures for {split}, expected at least 1; ask for more")

    def count(self, split: str) -> int:
        """Return the number of pictures in a split."""
        return int(getattr(self, split))

    def path(self, index: int) -> str:
        """Return the path of picture `index` below its split's folder; classes take turns."""
        return f"{list_species(self.species)[index % self.species].name}/{index:05d}.png"


def draw_image(guide: FieldGuide, split: str, index: int) -> Plate:
    """Draw picture `index` of a split; it depends on seed, size, split, index and number of species, on nothing else.

    The scene depends on the first four alone, so a picture's surroundings know nothing about its species.
    """
    rng = np.random.default_rng([guide.seed, SPLITS.index(split), index])
    return draw_plate(rng, list_species(guide.species)[index % guide.species], guide.size)


def write_field_guide(
    folder: str | os.PathLike[str],
    guide: FieldGuide,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Draw the guide into `folder`, which appears whole or not at all; return False if that guide is there already.

    Args:
        folder: a new folder in one that exists or can be made.
        guide: what to draw.
        workers: processes that draw; more than one start with `spawn`, so the calling script needs a `__main__` guard.
        progress: called with (pictures drawn, pictures in all) as the work goes on.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
    """
    target = Path(folder)
    if _is_there(target, guide):
        return False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror}; expected a writable place, name another"
        ) from error
    try:
        _fill(draft, guide, max(1, workers), progress)
        draft.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
        draft.rename(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; nothing of it was kept") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return True


def _is_there(target: Path, guide: FieldGuide) -> bool:
    """Say whether `target` holds this very guide, False if it does not exist."""
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
        raise OutputError(f"{target} lacks pictures of {missing[0]}; remove the folder and draw it again")
    return True


def _describe(guide: FieldGuide) -> dict[str, object]:
    return {"version": VERSION, **asdict(guide), "classes": [one.name for one in list_species(guide.species)]}


def _fill(draft: Path, guide: FieldGuide, workers: int, progress: Callable[[int, int], None] | None) -> None:
    for split in SPLITS:
        for index in range(min(guide.species, guide.count(split))):
            (draft / split / guide.path(index)).parent.mkdir(parents=True)
    jobs = [
        (draft, guide, split, range(start, min(start + _CHUNK, guide.count(split))))
        for split in SPLITS
        for start in range(0, guide.count(split), _CHUNK)
    ]
    boxes: dict[str, dict[str, tuple[int, int, int, int]]] = {split: {} for split in SPLITS}
    total, done = sum(guide.count(split) for split in SPLITS), 0
    for (_, _, split, indices), parts in zip(jobs, _run(jobs, workers), strict=True):
        boxes[split].update(zip((guide.path(index) for index in indices), parts, strict=True))
        done += len(indices)
        if progress is not None:
            progress(done, total)
    for split in SPLITS:
        write_parts(draft / split, boxes[split])
    (draft / _DESCRIPTION).write_text(json.dumps(_describe(guide), indent=2) + "\n", encoding="utf-8")


_Job = tuple[Path, FieldGuide, str, range]


def _run(jobs: list[_Job], workers: int) -> Iterator[list[tuple[int, int, int, int]]]:
    if workers == 1:
        yield from map(_draw_chunk, jobs)
        return
    # Not fork: the caller may hold threads (torch does), and a forked child inherits their locks.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_ignore_interrupt) as pool:
        try:
            yield from pool.map(_draw_chunk, jobs)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _ignore_interrupt() -> None:
    """Leave Ctrl-C to the parent, which cleans up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _draw_chunk(job: _Job) -> list[tuple[int, int, int, int]]:
    draft, guide, split, indices = job
    parts: list[tuple[int, int, int, int]] = []
    for index in indices:
        plate = draw_image(guide, split, index)
        # Noise hardly compresses: level 1 is three times as fast as the default for the same bytes.
        Image.fromarray(plate.image).save(draft / split / guide.path(index), compress_level=1)
        parts.append(plate.part)
    return parts


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
