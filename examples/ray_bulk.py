"""Bulk prediction of millions of images with Ray Data: Parquet in, Parquet out, on one machine or on a cluster.

    pip install 'mge-0.2.0-py3-none-any.whl[cpu]' 'ray[data]' pyarrow
    python ray_bulk.py --engine mge.plan images.parquet predictions --workers 8

Images are rows of a Parquet file, or of all of them in a folder: column `path` names each once, relative to the folder
or absolute, and column `bytes`, where there is one, holds the file. Predictions are rows of
`predictions/*.parquet`; an image that cannot be read is a row with an error. Called again, the command goes on with the
images that have no row yet.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import click
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from mge_runtime import Pipeline
from mge_runtime.bundle import Bundle
from mge_runtime.chain import Exit
from mge_runtime.cli.common import batch_option, exit_option, reports_errors, say
from mge_runtime.errors import InputError, brief, one_line
from mge_runtime.files import atomic_path, check_output

# Fields of `Prediction.to_dict` that are kept; another is another line.
SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "class_name": pa.string(),
        "probability": pa.float32(),
        "rejected": pa.bool_(),
        "experts_used": pa.int8(),
        "boxes": pa.list_(pa.list_(pa.float32())),
        "error": pa.string(),  # one line; null: the image was predicted
    }
)


class Predictor:
    """Predicts tables of images. Whoever makes one (an actor of Ray, a task of Spark) has a pipeline of its own."""

    def __init__(self, engine: str, root: str = "", threads: int = 1, batch: int = 8, **options: object) -> None:
        """Open the bundle.

        Args:
            engine: the `mge.plan` file, or `hf://owner/name`.
            root: the folder that relative paths begin at.
            threads: processors that it computes and decodes with: what the actor was given, not what the machine has.
            batch: images in one run of the chain.
            options: of `Pipeline.open`: device, exit, ...
        """
        self._root, self._batch, self._threads = root, batch, threads
        self._pipeline = Pipeline.open(engine, threads=threads, streams="auto", **options)

    def __call__(self, images: pa.Table) -> pa.Table:
        """Predict the rows of a table with a column `path` or `bytes` or both; rows of `SCHEMA` in the same order."""
        paths = images["path"].to_pylist()
        if "bytes" in images.column_names:
            sources = images["bytes"].to_pylist()
        else:
            sources = [None if path is None else os.path.join(self._root, path) for path in paths]  # noqa: PTH118
        rows = []
        predicted = self._pipeline.predict_iter(sources, batch=self._batch, workers=self._threads)
        for path, (_, found) in zip(paths, predicted, strict=True):
            values = {"error": one_line(found)} if isinstance(found, InputError) else found.to_dict()
            rows.append({**values, "path": path})
        return pa.Table.from_pylist(rows, SCHEMA)


def finished(folder: Path) -> pa.Array:
    """The paths that have a row in a folder of predictions."""
    parts = ds.dataset(sorted(map(str, folder.glob("*.parquet"))), SCHEMA)
    return parts.to_table(["path"])["path"].combine_chunks()


def unfinished(images: pa.Table, done: pa.Array) -> pa.Table:
    """The rows whose path is not among those that are done."""
    return images.filter(pc.invert(pc.is_in(images["path"].cast(pa.string()), done)))


@click.command()
@click.argument("images", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--engine", required=True, help="The bundle, mge.plan, at a path that every machine has.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Actors, one pipeline each.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Processors of an actor.")
@click.option("--rows", type=click.IntRange(min=1), default=500, show_default=True, help="Images of one output file.")
@batch_option(8)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Of an actor.")
@exit_option
@reports_errors
def main(
    images: Path, out: Path, engine: str, workers: int, threads: int, rows: int, batch: int, device: str, exit_at: Exit
) -> None:
    """Predict the images of Parquet tables, and go on where an earlier run stopped."""
    root = images if images.is_dir() else images.parent
    tables = sorted(map(str, images.glob("*.parquet"))) if root == images else [str(images)]
    try:
        columns = {field.name: field.type for field in ds.dataset(tables).schema}
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"cannot read {images}: {brief(error)}; expected a Parquet file or a folder") from error
    if columns.get("path") not in (pa.string(), pa.large_string()):
        raise InputError(f"{images} has the columns {', '.join(columns)}; expected texts in a column path")
    if out.resolve() == root.resolve():  # its tables would count as predictions
        raise InputError(f"{out} is the folder of the images; name another one for the predictions")
    try:
        done = finished(out)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"cannot read the predictions in {out}: {brief(error)}; remove that file") from error
    with Bundle.open(engine):  # one line here instead of many from every actor
        engine = engine if engine.startswith("hf://") else str(Path(engine).resolve())
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is not installed; install it: pip install 'ray[data]'") from error
    with suppress(OSError):  # the next line says what is wrong
        out.mkdir(parents=True, exist_ok=True)
    check_output(out / "any.parquet")
    # Here one processor more than actors hold, for what reads tables; on a cluster (RAY_ADDRESS) leave one free.
    ray.init(**({} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers * threads + 1}))
    ray.data.DataContext.get_current().enable_progress_bars = False
    done = ray.put(done)  # once on each machine
    predicted = (
        ray.data.read_parquet(tables)
        .select_columns([name for name in ("path", "bytes") if name in columns])
        # Steps that ask for the same processors become one, and all rows of a file would go to one actor: so 0.
        .map_batches(lambda table: unfinished(table, ray.get(done)), batch_format="pyarrow", num_cpus=0)
        .repartition(target_num_rows_per_block=rows)
        .map_batches(
            Predictor,
            fn_constructor_args=[engine, str(root.resolve()), threads, batch],
            fn_constructor_kwargs={"device": device, "exit": exit_at},
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads,
            num_gpus=int(device == "cuda"),
        )
    )
    # An actor that dies is started anew and its rows are predicted again; only this process writes, so none twice.
    for part in predicted.iter_batches(batch_size=None, batch_format="pyarrow"):
        if len(part):
            with atomic_path(out / f"{uuid4().hex}.parquet") as path:
                pq.write_table(part, path)
            say(f"{len(part)} images")


if __name__ == "__main__":
    main()
