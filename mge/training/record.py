"""What a run tells people: its progress, metrics.csv, curves.png."""

from __future__ import annotations

import csv
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mge_runtime.files import atomic_path, echo

History = Sequence[dict[str, float]]
_PANELS = (  # title, prefix of the columns, unit, limits, scale
    ("training loss", "loss/", "nats", None, "log"),
    ("validation accuracy", "top1/", "share of images", (0, 1), "linear"),
    ("median area of what each expert sees", "area/", "share of the first view", (0, 1.05), "linear"),
    ("learning rate, last step of the epoch", "lr/", "", None, "log"),
)
_LINES: dict[str, Any] = {"global": "--", "part": ":", "diversity": "-.", "distill": (0, (1, 4))}
_LINES |= {"mixture": "--", "average": ":", "balance": "-.", "heads": "--"}


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
        disable = None if self._shown else True  # None: where standard error is no terminal
        self._bar = tqdm(total=self._steps, initial=step, desc=self._name, unit="batch", leave=False, disable=disable)
        with self._bar:
            yield

    def step(self) -> None:
        """Count a step."""
        self._done += 1
        now, total = time.monotonic(), self._epochs * self._steps
        loss = "" if self.loss is None else f"loss {self.loss:.3f}, "
        left = (now - self._begun) / (self._done - self._first) * (total - self._done)  # validation so far counts in
        left = f"{tqdm.format_interval(left)} left of the run"
        if not self._bar.disable:
            self._bar.set_postfix_str(loss + left, refresh=False)
            self._bar.update()
        elif self._shown and now - self._said >= self.EVERY:
            self._said = now
            batch = (self._done - 1) % self._steps + 1
            echo(f"{self._name}, batch {batch}/{self._steps}: {loss}{self._done / total:.0%} done, {left}")


def write_csv(path: Path, history: History) -> None:
    """One row for each epoch; written anew each time, so that a resumed run leaves no double rows."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    with atomic_path(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)


def write_curves(path: Path, history: History) -> None:
    """Loss, validation accuracy, crop areas and learning rates over the epochs, as PNG.

    An expert has one color in all panels; its heads differ by their lines.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    # No pyplot: it keeps global state and may look for a display.
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    for axes, (title, prefix, unit, limits, scale) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for key in (key for key in history[-1] if key.startswith(prefix)):
            name = key.removeprefix(prefix)
            expert = next((digit for digit in name if digit.isdigit()), None)
            line = next((line for part, line in _LINES.items() if part in name), "-")
            values = [row.get(key, float("nan")) for row in history]
            axes.plot(epochs, values, label=name, color=f"C{expert}" if expert else "k", linestyle=line, marker=".")
        axes.set(title=title, xlabel="epoch", ylabel=unit, yscale=scale, ylim=limits)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    with atomic_path(path) as part:
        figure.savefig(part, format="png")
