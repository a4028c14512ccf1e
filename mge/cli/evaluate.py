"""`mge-eval`: the paper's table, for a checkpoint or a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mge_runtime.cli.common import (
    backend_option,
    batch_option,
    device_option,
    max_pixels_option,
    no_mmap_option,
    note,
    options_given,
    reports_errors,
    threads_option,
)
from mge_runtime.files import echo

if TYPE_CHECKING:
    from mge.evaluation import Predictions
    from mge_runtime.pipeline import Pipeline

__all__ = ["main"]

PATH = click.Path(path_type=Path)
Label = Callable[[tuple[str, ...]], list[tuple[Path, int]]]  # class names to the images with their index among these


@click.command(context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.option("--ckpt", type=PATH, help="A checkpoint: every head of every expert.")
@click.option("--engine", type=PATH, help="A bundle: every expert, as it runs on a device.")
@click.option(
    "--data",
    type=PATH,
    required=True,
    help="Folder with test/<class>/*.jpg, the class folders, a downloaded data set or a table of paths.",
)
@click.option("--split", default="test", help="Folder below --data, or split of its list, where there is one.")
@batch_option(32, "--batch-size")
@click.option("--workers", type=click.IntRange(0), default=2, help="Processes (threads for a bundle) that decode.")
@max_pixels_option
@device_option
@backend_option
@threads_option
@no_mmap_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--predictions", type=PATH, help="Also write labels, logits, gate and boxes to this .npz file.")
@click.version_option(package_name="mge")
@reports_errors
def main(
    ckpt: Path | None,
    engine: Path | None,
    data: Path,
    split: str,
    batch: int,
    workers: int,
    max_pixels: int,
    device: str,
    backend: str,
    threads: int | None,
    no_mmap: bool,
    as_json: bool,
    predictions: Path | None,
) -> None:
    """Print the paper's table: top-1, top-5, likelihood and calibration of every head, the gate, the crops' areas.

    --device, --backend, --threads and --no-mmap say how a bundle runs; a checkpoint runs on the CPU.
    """
    from mge.archive import check_file
    from mge.evaluation import figures, print_table, write_predictions
    from mge_runtime.errors import InputError
    from mge_runtime.layouts import find_list, relative_name
    from mge_runtime.sources import VALIDATION_FOLDERS, is_folder, list_labeled, require_folder, validation_folder

    if (ckpt is None) == (engine is None):
        raise click.UsageError("name either --ckpt or --engine")
    if ckpt is not None and (unused := options_given("device", "backend", "threads", "no_mmap")):
        raise click.UsageError(f"a checkpoint runs in PyTorch, which cannot use {', '.join(unused)}; leave that out")
    if (listed := find_list(data)) is not None:
        note(str(listed))
        folder = listed.root
    else:
        folder = data / split if is_folder(data / split) else data
        if split in VALIDATION_FOLDERS:
            folder = validation_folder(data) or data
        if is_folder(folder / "train"):
            raise InputError(f"no folder {data / split}; expected the images there, or name another with --split")
        require_folder(folder, "test/<class>/*.jpg in it, the class folders, a downloaded data set or a table of paths")

    def label(classes: tuple[str, ...]) -> list[tuple[Path, int]]:
        return list_labeled(folder, classes, note)[1] if listed is None else listed.labeled(split, classes)

    if ckpt is not None:
        check_file(ckpt)  # before PyTorch is loaded, which takes seconds
        found, samples = _run_checkpoint(ckpt, label, batch, workers, max_pixels)
    else:
        assert engine is not None  # noqa: S101 - the usage check above; for the type checker
        from mge_runtime.pipeline import Pipeline

        with Pipeline.open(
            engine, device, backend, threads, streams="auto", mmap=not no_mmap, max_pixels=max_pixels
        ) as pipeline:
            found, samples = _run_bundle(pipeline, label, batch, workers)
    names = [relative_name(path, folder) for path, _ in samples]
    result = figures(found, folder, names)
    if predictions is not None:
        write_predictions(predictions, found, names)
    if as_json:
        echo(json.dumps(result, indent=2))
    else:
        print_table(result)


def _run_checkpoint(ckpt: Path, label: Label, batch: int, workers: int, max_pixels: int) -> tuple[Predictions, Any]:
    from mge.checkpoint import load_checkpoint
    from mge.data.folder import FolderDataset, batches, make_loader
    from mge.evaluation import collect

    model = load_checkpoint(ckpt)
    samples = label(model.config.classes)
    loader = make_loader(FolderDataset(samples, model.config, max_pixels=max_pixels), batch, workers=workers)
    return collect(model, batches(loader)), samples


def _run_bundle(pipeline: Pipeline, label: Label, batch: int, workers: int) -> tuple[Predictions, Any]:
    from mge.evaluation import collect_bundle

    samples = label(pipeline.manifest.class_names)
    return collect_bundle(pipeline, samples, batch, max(workers, 1)), samples


if __name__ == "__main__":
    main()
