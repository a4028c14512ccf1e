"""`mge-export`: from a checkpoint to one file that runs without PyTorch."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from mge_runtime.cli.common import (
    Number,
    engine_batch_option,
    max_pixels_option,
    note,
    options_given,
    reports_errors,
)
from mge_runtime.errors import ExportError, MGEError
from mge_runtime.files import check_folder, check_output, echo
from mge_runtime.interrupt import interruptible

DEFAULT_NAME = "mge.plan"
PATH = click.Path(path_type=Path)
FEW = 16  # images to verify on where nobody says how many
SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


@click.command(context_settings=SETTINGS)
@click.option("--ckpt", type=PATH, help="best.pt of mge-train, or a checkpoint of the authors' code.")
@click.option("--engine", type=PATH, help="Instead of --ckpt: a bundle to attach a card to, or to write for others.")
@click.option("--fp16", is_flag=True, help="Backbones and part convolutions in half precision, the rest in FP32.")
@click.option("--int8", is_flag=True, help="Backbones in INT8 with --calib-data, FP16 around it. Implies --fp16.")
@click.option(
    "--calib-data",
    type=PATH,
    help="Photographs that INT8 ranges are learned from: a folder, or a data set (its training images).",
)
@click.option("--calib-images", type=click.IntRange(0), default=256, help="How many of them, drawn by seed; 0: all.")
@click.option(
    "--calib-method",
    type=click.Choice(["max", "entropy", "percentile", "mse"]),
    default="mse",
    help="How far the activations' ranges reach.",
)
@click.option(
    "--max-drop",
    type=Number(0, 100, max_open=True),
    default=0.5,
    help="Percent of calibration images on which INT8 may change the chain's class; the worst layers stay FP16.",
)
@click.option(
    "--min-box-iou",
    type=Number(0, 1, max_open=True),
    default=0.9,
    help="Least median IoU of each box of the chain with the float chain's; the worst layers stay FP16.",
)
@click.option("--calib-seed", type=click.IntRange(0), default=0, help="Of the draw from --calib-data.")
@click.option("--force-few-images", is_flag=True, help="Calibrate on fewer than 100 images, too.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET",
    help="Also build TensorRT engines. rtx:sm86,sm89,sm120: ahead of time with TensorRT-RTX, no GPU needed. native: "
    "for the GPU of this machine. onnx: none. Repeatable.  [default: native where there is a GPU]",
)
@engine_batch_option
@click.option("--extract", type=PATH, metavar="DIR", help="Also write plain ONNX and plan files here.")
@click.option(
    "--onnx",
    "onnx_file",
    type=PATH,
    metavar="FILE",
    help="Also write the whole chain as one ONNX file, and labels.txt beside it. With --fp16, CPUs run it at half the "
    "speed where experts share a backbone.",
)
@click.option(
    "--openvino",
    type=PATH,
    metavar="DIR",
    help="Also write the whole chain for OpenVINO: chain.xml, chain.bin, labels.txt. Needs the extra openvino.",
)
@click.option(
    "--triton",
    type=PATH,
    metavar="DIR",
    help="Also write a model repository for Triton Inference Server: the chain, and TensorRT engines of the bundle.",
)
@click.option("-o", "--output", type=PATH, help="The bundle.  [default: mge.plan beside the checkpoint]")
@click.option(
    "--verify-data",
    type=PATH,
    help="Photographs to verify on: a folder, or a data set (its validation images).  [default: held out of "
    "--calib-data; drawn without it]",
)
@click.option("--verify-images", type=click.IntRange(0), default=FEW, help="How many of them; 0: all of --verify-data.")
@max_pixels_option
@click.option("--labels", type=PATH, help="Text file, a class name a line.  [default: the checkpoint's]")
@click.option("--box-threshold", type=Number(0, 1, max_open=True), help="Of every crop.  [default: the checkpoint's]")
@click.option("--resize", type=click.IntRange(1), help="Pixels, the shorter side before the center crop.")
@click.option("--image-size", type=click.IntRange(1), help="Pixels, side of the first expert's input; others follow.")
@click.option(
    "--card",
    type=PATH,
    metavar="FILE",
    help="Attach a model card: this Markdown of yours (front matter with license; sections Data and Limits), then what "
    "is measured: accuracy, calibration, contents. mge-info --card prints it.",
)
@click.option(
    "--test-data",
    type=PATH,
    help="Labeled images for the accuracy in the card, which no choice has seen: a folder with test/<class>/*.jpg, the "
    "class folders, a downloaded data set or a table of paths.",
)
@click.option(
    "--hf",
    type=PATH,
    metavar="DIR",
    help="Also write a Hugging Face repository's files: card, bundle, labels.",
)
@click.option("--allow-mismatch", is_flag=True, help="Write even what is out of tolerance, and record that.")
@click.version_option(package_name="mge")
@reports_errors
def main(
    ckpt: Path | None,
    engine: Path | None,
    fp16: bool,
    int8: bool,
    calib_data: Path | None,
    calib_images: int,
    calib_method: str,
    max_drop: float,
    min_box_iou: float,
    calib_seed: int,
    force_few_images: bool,
    targets: tuple[str, ...],
    batch: str,
    extract: Path | None,
    onnx_file: Path | None,
    openvino: Path | None,
    triton: Path | None,
    output: Path | None,
    verify_data: Path | None,
    verify_images: int,
    max_pixels: int,
    labels: Path | None,
    box_threshold: float | None,
    resize: int | None,
    image_size: int | None,
    card: Path | None,
    test_data: Path | None,
    hf: Path | None,
    allow_mismatch: bool,
) -> None:
    """Export a checkpoint to one bundle, with a parity report; out of tolerance, nothing is written.

    The bundle always holds ONNX graphs, which run anywhere; engines for TensorRT lie beside them, one set a target, and
    mge-build adds more on the device.
    """
    if (ckpt is None) is (engine is None):
        raise click.UsageError("name either --ckpt, to export it, or --engine, a finished bundle")
    beside = {"extract": extract, "onnx": onnx_file, "openvino": openvino, "triton": triton, "hf": hf}
    if engine is not None:
        usable = {"engine", "card", "test_data", "max_pixels", "onnx_file", *beside}
        others = {parameter.name or "" for parameter in click.get_current_context().command.params} - usable
        if unused := options_given(*others):
            raise click.UsageError(f"--engine is a finished bundle, which cannot use {', '.join(unused)}: leave it out")
        if not any((card, test_data, *beside.values())):
            options = ", ".join(f"--{name}" for name in beside)
            raise click.UsageError(f"--engine alone writes nothing: add --card, {options}")
    if card is None and (test_data or (hf and ckpt)):
        raise click.UsageError("there is no model card to write: add --card FILE")
    if int8 is not (calib_data is not None):
        raise click.UsageError(
            "--int8 learns ranges from photographs and none were named: add --calib-data DIR"
            if int8
            else "--calib-data is for --int8, which was not asked for: add --int8, or leave --calib-data out"
        )
    if verify_images == 0 and verify_data is None:
        raise click.UsageError("--verify-images 0 takes all images of --verify-data: name that folder, or a number")
    path = engine or output or Path(ckpt or "").parent / DEFAULT_NAME
    files = [file.resolve() for file in (ckpt, path, onnx_file) if file is not None]
    if len(set(files)) < len(files):
        raise click.UsageError("the checkpoint, the bundle and --onnx are one file twice: name files that differ")
    # What can be told before the work, and without PyTorch, whose import takes seconds.
    for folder in filter(None, (extract, openvino, triton, hf)):
        check_folder(folder)
    if onnx_file is not None:
        check_output(onnx_file)
    if triton is not None:
        from mge_export.triton import check_repository

        check_repository(triton)
    if hf is not None:
        from mge_export.card import check_hub_folder

        check_hub_folder(hf, path)
    describe = None
    if card is not None:
        from mge_export.card import CardRequest

        describe = CardRequest.read(card, test_data, max_pixels, note)
    if openvino is not None:
        from mge_export.openvino import load_openvino

        load_openvino()
    if ckpt is None:
        with interruptible("the export", f"{path} is whole; run it again", ExportError):
            if describe is not None:
                describe.attach(path, path.name)
                echo(f"{path}: has its card: mge-info {shlex.quote(str(path))} --card")
            _write_beside(path, beside, echo)
        return
    from mge.archive import check_file
    from mge.config import read_labels
    from mge_calibration.int8.images import CALIBRATION_FOLDER
    from mge_export.images import VERIFY_FOLDER
    from mge_export.targets import EnginePlan
    from mge_runtime.layouts import require_images

    check_output(path)
    check_file(ckpt)
    if labels is not None:
        read_labels(labels)
    if verify_data is not None:
        require_images(verify_data, VERIFY_FOLDER)
    if calib_data is not None:
        require_images(calib_data, CALIBRATION_FOLDER)
    plan = EnginePlan.parse(targets, batch)
    plan.check(fp16=fp16 or int8)
    # The imports take seconds, too.
    with interruptible("the export", f"nothing was written to {path}; run it again", ExportError) as interrupt:
        from mge.checkpoint import load_checkpoint
        from mge_calibration.int8.images import read_calibration_images
        from mge_calibration.int8.quantize import Int8Options
        from mge_export.export import export_bundle
        from mge_export.images import find_verify_images, generated_images, photographs
        from mge_export.int8 import Int8Request
        from mge_export.precision import Precision
        from mge_runtime.bundle import Bundle
        from mge_runtime.files import file_sha256

        def say(line: str) -> None:
            interrupt()
            click.echo(line, err=True)

        model = load_checkpoint(ckpt, labels=labels, box_threshold=box_threshold, resize=resize, image_size=image_size)
        preprocess = model.config.preprocess
        request = None
        if verify_data is not None:
            images = find_verify_images(verify_data, preprocess, verify_images, say, max_pixels=max_pixels)
        else:
            images = generated_images(preprocess, verify_images)
        if calib_data is not None:
            frames = read_calibration_images(
                calib_data,
                preprocess,
                limit=calib_images,
                seed=calib_seed,
                few=force_few_images,
                hold_out=0 if verify_data is not None else verify_images,
                say=say,
                max_pixels=max_pixels,
            )
            if frames.held_out:
                origin = f"images in {calib_data.resolve().name} that set no ranges"
                images = photographs(frames.held_out, origin, preprocess, say, max_pixels=max_pixels)
            options = Int8Options(calib_method, max_drop=max_drop / 100, min_box_iou=min_box_iou, seed=calib_seed)
            request = Int8Request(frames, options)

        def finish(finished: Path) -> None:
            plan.build(finished, interrupt, say)
            if describe is not None:
                describe.attach(finished, path.name)

        result = export_bundle(
            model,
            path,
            Precision.INT8 if int8 else Precision.FP16 if fp16 else Precision.FP32,
            images,
            half_linear=plan.turing,
            int8=request,
            checkpoint_sha256=file_sha256(ckpt),
            allow_mismatch=allow_mismatch,
            finish=finish,
            say=say,
        )
        interrupt.consequence = f"{path} was written before"
        try:
            _write_beside(path, beside, say)
        except MGEError as error:
            raise type(error)(f"{error}; {path} was written before") from error
    if result.report.failures:
        click.echo(f"warning: {len(result.report.failures)} values are out of tolerance; the bundle says so", err=True)
    weights = sum(entry.size for name, entry in result.manifest.entries.items() if name.endswith(".weights"))
    with Bundle.open(path) as bundle:
        engines = f", engines for {', '.join(bundle.targets)}" if bundle.targets else ""
    echo(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(result.manifest.graphs)} graphs, "
        f"weights {weights / 1e6:.1f} MB{engines}"
    )
    echo(f"run it: mge-run --engine {shlex.quote(str(path))} IMAGES...")


def _write_beside(path: Path, places: Mapping[str, Path | None], say: Callable[[str], None]) -> None:
    """Write what others read of a finished bundle to the places of these options; only "onnx" loads PyTorch."""
    from mge_runtime.bundle import Bundle

    with Bundle.open(path) as bundle:
        if (extract := places["extract"]) is not None:
            say(f"extracted {len(bundle.extract(extract))} files to {extract}")
        if (onnx := places["onnx"]) is not None:
            from mge_export.chain import write_chain

            say(f"wrote {', '.join(map(str, write_chain(bundle, onnx)))}")
        if (openvino := places["openvino"]) is not None:
            from mge_export.openvino import write_openvino

            say(f"wrote {', '.join(map(str, write_openvino(bundle, openvino)))}")
        if (triton := places["triton"]) is not None:
            from mge_export.triton import write_triton

            say(f"wrote {len(write_triton(bundle, triton))} files to {triton}")
    if (hf := places["hf"]) is not None:
        from mge_export.card import write_hub_folder

        say(f"wrote {', '.join(map(str, write_hub_folder(path, hf)))}")


if __name__ == "__main__":
    main()
