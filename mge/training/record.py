"""What a run leaves for people: metrics.csv, TensorBoard events, curves.png."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from mge_runtime.files import atomic_path

__all__ = ["Board", "write_csv", "write_curves"]

History = Sequence[dict[str, float]]


def write_csv(path: Path, history: History) -> None:
    """One row for each epoch; written anew each time, so that a resumed run leaves no double rows."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    with atomic_path(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)


class Board:
    """TensorBoard events of a run; a run that is resumed adds a file to the folder, and no step appears twice.

    Args:
        folder: of the event files, made if missing.
        first: the epoch, from 1, that comes next: viewers forget what earlier files say about it and later ones.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, row: dict[str, float]) -> None:
        """Add one epoch's row, to be seen at once."""
        for key, value in row.items():
            if key != "epoch":
                self._writer.add_scalar(key, value, int(row["epoch"]))
        self._writer.flush()


def write_curves(path: Path, history: History) -> None:
    """Loss, validation accuracy and crop areas over the epochs, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    # No pyplot: it keeps global state and may look for a display.
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = (
        ("training loss", "loss/", "nats", None),
        ("validation accuracy", "top1/", "share of images", (0, 1)),
        ("median area of what each expert sees", "area/", "share of the first view", (0, 1.05)),
    )
    for axes, (title, prefix, unit, limits) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for key in (key for key in history[-1] if key.startswith(prefix)):
            axes.plot(
                epochs, [row.get(key, float("nan")) for row in history], label=key.removeprefix(prefix), marker="."
            )
        axes.set(title=title, xlabel="epoch", ylabel=unit, ylim=limits)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    with atomic_path(path) as part:
        FigureCanvasAgg(figure).print_png(str(part))
