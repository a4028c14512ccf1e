"""A client of Triton over HTTP: the classes of images.

    pip install 'tritonclient[http]'
    python examples/triton/client.py groceries models/photographs/*.jpg --engine models/groceries.plan

The server runs what `mge-export --triton` wrote; images become frames here, as the bundle says. `--frame FILE` only
writes the frame of one image, for curl.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import click
import numpy as np
import tritonclient.http as triton

from mge_runtime import Bundle
from mge_runtime.cli.common import reports_errors
from mge_runtime.decode import open_image
from mge_runtime.errors import InputError, brief
from mge_runtime.preprocess import to_frame

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("model")
@click.argument("images", nargs=-1, type=PATH, required=True)
@click.option("--engine", type=PATH, required=True, help="The bundle, or a copy of it: it says how frames are made.")
@click.option("--url", default="localhost:8000", show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--frame", type=click.File("wb"), help="Write the first image's frame here, raw bytes, and ask nobody.")
@reports_errors
def main(model: str, images: tuple[Path, ...], engine: Path, url: str, top_k: int, frame: BinaryIO | None) -> None:
    """Ask MODEL for the classes of IMAGES, sent as one batch: at most as many as the server's max_batch_size."""
    with Bundle.open(engine) as bundle:
        preprocess = bundle.manifest.preprocess
    frames = np.stack([to_frame(open_image(path), preprocess)[0] for path in images])
    if frame is not None:
        frame.write(frames[0].tobytes())
        return
    sent = triton.InferInput("frame", list(frames.shape), "UINT8")
    sent.set_data_from_numpy(frames)
    asked = triton.InferRequestedOutput("probabilities", class_count=top_k)
    try:
        with triton.InferenceServerClient(url.removeprefix("http://")) as client:
            found = np.asarray(client.infer(model, [sent], outputs=[asked]).as_numpy("probabilities"))
    except (triton.InferenceServerException, OSError) as error:
        raise InputError(f"the server at {url} did not predict: {brief(error)}") from error
    for path, classes in zip(images, found, strict=True):
        for line in classes:  # b"0.998:17:Granny-Smith"
            value, _, name = line.decode().split(":", 2)
            click.echo(f"{100 * float(value):5.1f} %  {name}  {path}")


if __name__ == "__main__":
    main()
