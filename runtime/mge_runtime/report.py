"""The outputs of `mge-run`: text for people, JSON lines, CSV, drawn images."""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeAlias

from mge_runtime.errors import InputError, OutputError, one_line, printable
from mge_runtime.files import atomic_path, echo
from mge_runtime.prediction import NONE_OF_THESE
from mge_runtime.sources import SAVED_SUFFIX, NamedImage

if TYPE_CHECKING:
    from mge_runtime.decode import ImageSource
    from mge_runtime.prediction import Prediction


Form: TypeAlias = Literal["line", "block", "json"]  # what is printed of an image

_LONGEST_STEM = 150  # bytes; file systems allow 255 for the whole name


class Lines:
    """Prints each image: a line (probability, class, name), a block of a few with the boxes, or a line of JSON."""

    def __init__(self, form: Form, top_k: int) -> None:
        self._form: Form = form
        self._top_k = top_k  # likeliest classes in a block or in JSON

    def add(self, image: str, prediction: Prediction, saved: Path | None) -> None:
        """Print a prediction, and where it was drawn.

        Raises:
            OutputError: as `echo`.
        """
        if self._form == "json":  # in ASCII, so that every locale can print it
            record = json_record(image, prediction, self._top_k)
            echo(json.dumps(record if saved is None else {**record, "saved": _unicode(str(saved))}))
        elif self._form == "line":
            widest = min(max(map(len, prediction.class_names)), 40)  # the columns line up from line to line
            name, share = headline(prediction)
            echo(printable(f"{share:>6}  {name:<{widest}}  {image}"))
        else:
            echo("\n".join(map(printable, self._block(image, prediction, saved))))

    def add_error(self, image: str, error: InputError) -> None:
        """Print what JSON has of an image that could not be read; text has its line on standard error."""
        if self._form == "json":
            echo(json.dumps(json_record(image, error, self._top_k)))

    def _block(self, image: str, prediction: Prediction, saved: Path | None) -> list[str]:
        lines = [image, *(f"  {probability:6.1%}  {name}" for name, probability in prediction.top_k(self._top_k))]
        lines[1:1] = [f"  {line}" for line in prediction.notes()]
        for k, (x0, y0, x1, y1) in enumerate(prediction.boxes.tolist()):
            share = "" if prediction.gate is None else f"counts {float(prediction.gate[k]):4.0%}, "
            lines.append(f"  expert {k + 1}  {share}saw x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f}")
        lines[-1] += f" of {prediction.width} x {prediction.height} pixels"
        lines.append(f"  {prediction.timings_ms['total']:.0f} ms")
        return lines if saved is None else [*lines, f"  drawn: {saved}"]


def headline(prediction: Prediction) -> tuple[str, str]:
    """The class and its probability in few characters; of what is rejected, that."""
    return (NONE_OF_THESE, "-") if prediction.rejected else (prediction.class_name, f"{prediction.probability:.1%}")


def json_record(image: str, found: Prediction | InputError, top_k: int) -> dict[str, Any]:
    """What JSON says of one image: its prediction, or why it could not be read."""
    said = {"error": one_line(found)} if isinstance(found, InputError) else found.to_dict(top_k=top_k)
    return {"image": _unicode(image), **said}


def _unicode(name: str) -> str:
    """A file's name as JSON can hold it: bytes that are no UTF-8 become U+FFFD."""
    return name.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


class CsvTable:
    """Rows of CSV, one for each image; made by `csv_table`.

    Values are written as they are, so that a program reads what was predicted: a name that begins with "=" is no
    formula here, and a spreadsheet has to be told so ("import as text"). A terminal gets what it can show.
    """

    def __init__(self, stream: TextIO | _Stdout, experts: int, top_k: int, judged: bool) -> None:
        self._text = printable if stream.isatty() else str
        self._writer = csv.writer(stream, lineterminator="\n")
        self._experts, self._top_k, self._judged = experts, top_k, judged
        numbers = range(1, experts + 1)
        header = ["image", "class_index", "class_name", "probability"]
        header += [f"{field}_{rank}" for rank in range(2, top_k + 1) for field in ("class_name", "probability")]
        header += ["rejected", "set", "coarse"] if judged else []
        header += ["calibrated", "experts_used", *(f"gate_{k}" for k in numbers)]
        header += [f"box_{k}_{edge}" for k in numbers for edge in ("x0", "y0", "x1", "y1")]
        self._columns = [*header, "width", "height", "total_ms", "error"]
        self._write(self._columns)

    def add(self, image: str, prediction: Prediction, _saved: Path | None = None) -> None:
        """Write one row; what did not run (gate, later experts) stays empty."""
        values = prediction.to_dict(top_k=self._top_k)
        row = [image, values["class_index"], values["class_name"], values["probability"]]
        row += [top[field] for top in values["top"][1:] for field in ("class_name", "probability")]
        if self._judged:
            row += ["" if prediction.rejected is None else "yes" if prediction.rejected else "no"]
            row += ["|".join(prediction.set or ()), prediction.coarse.name if prediction.coarse else ""]
        row += ["yes" if prediction.calibrated else "no"]
        row += [prediction.experts_used, *(values["gate"] or [""] * self._experts)]
        row += [edge for box in values["boxes"] for edge in box]
        row += [""] * (4 * (self._experts - prediction.experts_used))
        self._write([*row, prediction.width, prediction.height, values["timings_ms"]["total"], ""])

    def add_error(self, image: str, error: InputError) -> None:
        """Write the row of an image that could not be read: its name and why."""
        self._write([image, *[""] * (len(self._columns) - 2), one_line(error)])

    def _write(self, row: Iterable[object]) -> None:
        self._writer.writerow([self._text(value) if isinstance(value, str) else value for value in row])


class _Stdout:
    """Standard output for CSV: bytes of names as they are, every row at once.

    Raises:
        OutputError: it is closed.
    """

    def __init__(self) -> None:
        stdout: TextIO | None = sys.stdout  # None where the process was started without one
        if stdout is None:
            raise OutputError("cannot print the CSV table: standard output is closed; name a file for it")
        self.isatty = stdout.isatty
        if reconfigure := getattr(stdout, "reconfigure", None):
            reconfigure(encoding="utf-8", errors="surrogateescape", newline="")

    def write(self, text: str) -> None:
        echo(text, nl=False)


def is_stdout(path: Path | None) -> bool:
    """Whether a path given for an output is standard output."""
    return path is not None and str(path) in ("-", "/dev/stdout")


@contextmanager
def csv_table(path: Path, experts: int, top_k: int, judged: bool = False) -> Generator[CsvTable]:
    """Open a CSV file that appears whole at the end of the block, or not at all; "-" prints row by row.

    `judged` adds what rejects, the set (its classes with "|" between them) and the coarser class.

    Raises:
        OutputError: the place cannot be written; said before anything is computed.
    """
    if is_stdout(path):
        yield CsvTable(_Stdout(), experts, top_k, judged)
    else:
        with (
            atomic_path(path) as temporary,
            temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
        ):
            yield CsvTable(stream, experts, top_k, judged)


class ImageFolder:
    """Gives every image a file of its own, `<name>.mge.png`, in one folder; made by `image_folder`."""

    def __init__(self, folder: Path, images: Sequence[NamedImage]) -> None:
        self._paths: dict[NamedImage, Path] = {}
        # Two folders may each hold an a.jpg, "A" and "a" may be one file here, and no image may be written over.
        taken = {str(image.path.resolve()).casefold() for image in images}
        root, numbers = folder.resolve(), dict[str, int]()
        for image in images:
            stem = os.fsdecode(os.fsencode(image.path.stem)[:_LONGEST_STEM])
            number = numbers.get(stem, 1)
            while (place := str(root / _saved_name(stem, number)).casefold()) in taken:
                number += 1
            taken.add(place)
            numbers[stem] = number
            self._paths[image] = folder / _saved_name(stem, number)

    def save(self, image: NamedImage, source: ImageSource, prediction: Prediction) -> Path:
        """Draw a prediction and write the file whole.

        Raises:
            InputError: the image has become unreadable since it was predicted.
            OutputError: the file cannot be written.
        """
        from mge_runtime.decode import decode_image
        from mge_runtime.draw import draw_prediction

        drawn = draw_prediction(decode_image(source, prediction.width * prediction.height), prediction)
        path = self._paths[image]
        with atomic_path(path) as temporary:
            drawn.save(temporary, "PNG", compress_level=3)
        return path


def _saved_name(stem: str, number: int) -> str:
    return (stem if number == 1 else f"{stem}-{number}") + SAVED_SUFFIX


@contextmanager
def image_folder(folder: Path, images: Sequence[NamedImage]) -> Generator[ImageFolder]:
    """Make the folder for drawn images; a new one that stays empty is removed again.

    Raises:
        OutputError: it cannot be made or written; said before anything is computed.
    """
    try:
        existed = folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write images to {folder}: {error.strerror}; expected a writable folder, name another place"
        ) from error
    try:
        yield ImageFolder(folder, images)
    finally:
        if not existed:
            with suppress(OSError):
                folder.rmdir()
