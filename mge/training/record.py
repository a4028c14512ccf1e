"""What a run tells people: its progress, metrics.csv, TensorBoard events, curves.png."""

from __future__ import annotations

import csv
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from tqdm import tqdm

from mge_runtime.draw import expert_color
from mge_runtime.files import atomic_path

__all__ = ["Board", "Meter", "write_csv", "write_curves"]

History = Sequence[dict[str, float]]


class Meter:
    """Shows how far a run is: a bar for each epoch on a terminal, elsewhere a line every `EVERY` seconds.

    Args:
        epochs: of the run.
        steps: of an epoch.
        done: steps of the run that an earlier process did.
        shown: whether anything is shown at all.
    """

    EVERY = 30.0

    def __init__(self, epochs: int, steps: int, done: int, *, shown: bool) -> None:
        self.loss: float | None = None  # to show
        self._epochs, self._steps, self._shown = epochs, steps, shown
        self._first = self._done = done
        self._begun = self._said = time.monotonic()

    @contextmanager
    def epoch(self, epoch: int, step: int) -> Generator[None]:
        """Show an epoch (from 0) inside the block, which begins at a step of it (from 0)."""
        self._name = f"epoch {epoch + 1}/{self._epochs}"
        self._bar = tqdm(
            total=self._steps,
            initial=step,
            desc=self._name,
            unit="batch",
            leave=False,
            disable=None if self._shown else True,  # None: where standard error is no terminal
        )
        with self._bar:
            yield

    def step(self) -> None:
        """Count a step."""
        self._done += 1
        now = time.monotonic()
        loss = "" if self.loss is None else f"loss {self.loss:.3f}, "
        left = (now - self._begun) / (self._done - self._first) * (self._epochs * self._steps - self._done)
        left = f"{tqdm.format_interval(left)} left of the run"  # validation so far counts in
        if not self._bar.disable:
            self._bar.set_postfix_str(loss + left, refresh=False)
            self._bar.update()
        elif self._shown and now - self._said >= self.EVERY:
            self._said = now
            share = self._done / (self._epochs * self._steps)
            batch = (self._done - 1) % self._steps + 1
            click.echo(f"{self._name}, batch {batch}/{self._steps}: {loss}{share:.0%} done, {left}")


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
    """Loss, validation accuracy, crop areas and learning rates over the epochs, as PNG.

    An expert has one colour in all panels; its heads differ by their lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    # No pyplot: it keeps global state and may look for a display.
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    panels = (
        ("training loss", "loss/", "nats", None, "log"),
        ("validation accuracy", "top1/", "share of images", (0, 1), "linear"),
        ("median area of what each expert sees", "area/", "share of the first view", (0, 1.05), "linear"),
        ("learning rate, last step of the epoch", "lr/", "", None, "log"),
    )
    for axes, (title, prefix, unit, limits, scale) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for key in (key for key in history[-1] if key.startswith(prefix)):
            name = key.removeprefix(prefix)
            values = [row.get(key, float("nan")) for row in history]
            colour, line = _style(name)
            axes.plot(epochs, values, label=name, color=colour, linestyle=line, marker=".")
        axes.set(title=title, xlabel="epoch", ylabel=unit, yscale=scale)
        if limits is not None:
            axes.set_ylim(limits)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    with atomic_path(path) as part:
        FigureCanvasAgg(figure).print_png(str(part))


def _style(name: str) -> tuple[tuple[float, ...], str]:
    """Colour and line of a curve: "expert 2 parts", "part_2", "mixture", "trunk"."""
    number = next((int(digit) for digit in reversed(name) if digit.isdigit()), None)
    if number is None:
        shade = 0.0 if name in ("mixture", "trunk") else 0.55
        return (shade, shade, shade), "--" if name == "heads" else "-"
    line = "--" if "global" in name else ":" if "part" in name else "-." if "diversity" in name else "-"
    return tuple(value / 255 for value in expert_color(number - 1)), line
