"""`mge-eval`: what each part of a checkpoint or a bundle is worth and costs, on labeled images; or two compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mge_runtime.cli.common import (
    Opening,
    batch_option,
    note,
    opening_options,
    options_given,
    reports_errors,
)
from mge_runtime.files import check_writable, echo

if TYPE_CHECKING:
    from mge.evaluation import Evaluation, Label


PATH = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.option("--ckpt", type=PATH, help="A checkpoint: every head of every expert.")
@click.option("--engine", type=PATH, help="A bundle: every expert, as it runs on a device.")
@click.option(
    "--compare",
    type=PATH,
    nargs=2,
    metavar="A B",
    help="Compare two instead: checkpoints, bundles (.plan, hf://), or what --predictions wrote (.npz).",
)
@click.option(
    "--data",
    type=PATH,
    help="Folder with test/<class>/*.jpg, the class folders, a downloaded data set or a table of paths.",
)
@click.option("--split", default="test", help="Folder below --data, or split of its list, where there is one.")
@batch_option(32, "--batch-size")
@click.option("--workers", type=click.IntRange(0), default=2, help="Processes (threads for a bundle) that decode.")
@opening_options
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--report", type=PATH, help="Also write a page for people, with images, to this HTML file.")
@click.option("--predictions", type=PATH, help="Also write labels, logits, gate, boxes and cost to this .npz file.")
@click.version_option(package_name="mge")
@reports_errors
def main(
    ckpt: Path | None,
    engine: Path | None,
    compare: tuple[Path, Path] | None,
    data: Path | None,
    split: str,
    batch: int,
    workers: int,
    opening: Opening,
    as_json: bool,
    report: Path | None,
    predictions: Path | None,
) -> None:
    """Print what each head, each expert, their averages, the mixture and early exits are worth, and what they cost.

    Also the gate, the crops' areas, the least accurate classes and the most confused ones. With --compare A B instead:
    the differences of top-1 with paired intervals, and the images that one alone gets right.

    --device, --backend, --threads and --no-mmap say how a bundle runs; a checkpoint runs on the CPU.
    """
    from mge.archive import check_file
    from mge.evaluation import evaluate_bundle, find_labeled
    from mge_runtime.hub import HubAddress

    models = [path for path in (ckpt, engine) if path is not None]
    if (compare is None) is not (len(models) == 1) or (compare and models):
        raise click.UsageError("name either --ckpt or --engine, or two models after --compare")
    if compare and (unused := options_given("report", "predictions")):
        raise click.UsageError(f"--compare prints what it finds and cannot use {', '.join(unused)}; leave that out")
    if predictions is not None and predictions.suffix != ".npz":
        raise click.UsageError(f"--predictions writes a NumPy file, which --compare knows by .npz, not {predictions}")
    models = list(compare or models)
    stored = [path for path in compare or () if path.suffix == ".npz"]
    bundles = [path for path in compare or () if path.suffix == ".plan" or HubAddress.parse(str(path))]
    bundles += [engine] if engine else []
    if not bundles and (unused := options_given("device", "backend", "threads", "no_mmap")):
        raise click.UsageError(f"a checkpoint runs in PyTorch, which cannot use {', '.join(unused)}; leave that out")
    if data is None and len(stored) < len(models):
        raise click.UsageError("name the folder of the images with --data")
    images = None if data is None else find_labeled(data, split, note)
    for path in (report, predictions):  # before the work, as all of these are
        if path is not None:
            check_writable(path)
    for path in models:
        if path not in (*stored, *bundles):
            check_file(path)  # PyTorch takes seconds to load

    def evaluate(path: Path) -> Evaluation:
        assert images is not None  # noqa: S101 - the usage check above; for the type checker
        if path not in bundles:
            return _run_checkpoint(path, *images, batch, workers, opening["max_pixels"])
        return evaluate_bundle(path, *images, batch, workers, **opening)

    if compare is not None:
        from mge.comparison import compare_models, print_comparison
        from mge.evaluation import read_predictions

        known = {path: read_predictions(path) for path in stored}
        sides = [known[path] if path in known else evaluate(path).named for path in compare]
        result = compare_models(sides[0], sides[1])
        if not as_json:
            print_comparison(result, [path.name for path in compare])
    else:
        if report is not None:
            import mge.report  # noqa: F401 - before the work: it may need what is not installed
        from mge.evaluation import write_predictions
        from mge.figures import figures, print_table

        found = evaluate(models[0])
        result = figures(found)
        if predictions is not None:
            write_predictions(predictions, *found.named)
        if not as_json:
            print_table(result)
        if report is not None:
            from mge.report import write_report

            write_report(report, result, found, opening["max_pixels"])
    if as_json:
        echo(json.dumps(result, indent=2))


def _run_checkpoint(
    ckpt: Path, folder: Path, root: Path, label: Label, batch: int, workers: int, max_pixels: int
) -> Evaluation:
    from mge.checkpoint import load_checkpoint
    from mge.cost import model_cost
    from mge.data.folder import FolderDataset, batches, make_loader
    from mge.evaluation import Evaluation, collect, with_stops

    model = load_checkpoint(ckpt)
    config, samples = model.config, label(model.config.classes)
    loader = make_loader(FolderDataset(samples, config, max_pixels=max_pixels), batch, workers=workers)
    found = with_stops(collect(model, batches(loader)))
    found = replace(found, cost=model_cost(model), classes=config.classes)
    return Evaluation(found, samples, folder, root, ckpt.name, config.to_dict())
