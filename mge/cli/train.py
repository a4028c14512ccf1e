"""`mge-train`: train a mixture of granularity-specific experts on a folder of images."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mge_runtime.cli.common import Number, max_pixels_option, note, reports_errors
from mge_runtime.errors import CheckpointError, OutputError, TrainingError, brief
from mge_runtime.files import atomic_path, check_writable, echo, lock

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from mge.config import MGEConfig
    from mge.model import MGENet

__all__ = ["main"]

PATH = click.Path(path_type=Path)
UNIT = Number(0, 1, max_open=True)
CROP_AREA = 0.5  # share of its image that the median crop keeps, unless asked for another
# What may differ from the run that --resume goes on with; of --epochs, more.
FREE = frozenset(
    {"data", "out", "overwrite", "resume", "dry_run", "epochs", "workers", "max_pixels"}
    | {"accelerator", "devices", "compile"}
)


def _sizes(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    del context, parameter
    try:
        return tuple(int(side) for side in value.split(",")) if value else ()
    except ValueError as error:
        raise click.BadParameter(f"found {value!r}; expected pixels separated by commas, as 448,224,224") from error


@click.command(context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.option(
    "--data",
    type=PATH,
    help="Folder with train/<class>/*.jpg and, if you have it, val/; or a downloaded data set (CUB-200-2011, NABirds, "
    "FGVC-Aircraft, ...), or a table of paths and labels (.csv, .parquet).  [a new run: required]",
)
@click.option("--out", type=PATH, help="Folder for what the run writes.  [default: runs/mge, or that of --resume]")
@click.option("--overwrite", is_flag=True, help="Replace the run that --out holds.")
@click.option(
    "--dry-run", is_flag=True, help="Check the images, time a few steps, say what the run costs; write nothing."
)
@click.option(
    "--recipe",
    type=click.Choice(["default", "paper"]),
    default="default",
    help="paper: box thresholds fixed at 0.2, as published; all other defaults are the paper's anyway.",
)
@click.option("--arch", default="resnet50", help="timm backbone; any CNN with features at strides 16 and 32.")
@click.option(
    "--init",
    default="timm",
    metavar="timm|none|FILE",
    help="Weights to start from. timm: ImageNet's, downloaded; FILE.safetensors: a backbone's; FILE.pt: fine-tune that "
    "checkpoint; none: random.",
)
@click.option("--experts", type=click.IntRange(1), default=3, help="Experts in the chain; 1 trains a single network.")
@click.option(
    "--gate",
    type=click.Choice(["network", "shared", "none"]),
    default="network",
    help="What weighs the experts. network: a backbone of its own (the paper's); shared: a linear layer over what the "
    "experts saw; none: fixed weights, learned on the validation images.",
)
@click.option(
    "--gate-balance",
    type=Number(0),
    default=0.0,
    help="Weight of the loss term that keeps a gate from trusting one expert alone.",
)
@click.option(
    "--image-size",
    type=click.IntRange(32),
    default=448,
    help="Side of every expert's input in pixels; from 160 on, attention maps are fine enough to place crops well.",
)
@click.option(
    "--image-sizes",
    metavar="S1,S2,...",
    callback=_sizes,
    help="Side of each expert's input, where they differ: 448,224,224 costs half of three times 448.",
)
@click.option(
    "--source-size",
    type=click.IntRange(0),
    default=0,
    help="Crops are cut from a frame of this side, a multiple of --image-size, so that they show what the first expert "
    "does not see; 0: each from the image of the expert before.",
)
@click.option(
    "--resize", type=int, help="Shorter side before the crop of the frame, pixels.  [default: 8/7 of the frame's]"
)
@click.option("--mean", type=float, nargs=3, default=(0.5, 0.5, 0.5), help="Mean of RGB in [0, 1].")
@click.option("--std", type=float, nargs=3, default=(0.5, 0.5, 0.5), help="Deviation of RGB in [0, 1].")
@click.option(
    "--box-threshold",
    type=UNIT,
    multiple=True,
    help="Fixed box threshold, once or once for each crop.  [default: thresholds follow --crop-area]",
)
@click.option(
    "--crop-area",
    type=Number(0, 1, min_open=True),
    multiple=True,
    help="Share of its image that the median crop keeps, once or for each crop; box thresholds are set to it after "
    f"each epoch, on the validation images.  [default: {CROP_AREA}]",
)
@click.option("--parts-per-class", type=click.IntRange(1), default=10, help="Channels of the part convolution.")
@click.option(
    "--normalize-features/--plain-features", default=None, help="BatchNorm before heads.  [default: where needed]"
)
@click.option("--epochs", type=click.IntRange(1), default=100)
@click.option("--batch-size", type=click.IntRange(2), default=10, help="Images in a step of each process.")
@click.option("--head-lr", type=Number(0, min_open=True), default=0.01, help="Learning rate of the heads.")
@click.option("--backbone-lr", type=Number(0), default=0.001, help="Learning rate of the backbones.")
@click.option("--weight-decay", type=Number(0), default=1e-4)
@click.option("--schedule", type=click.Choice(["step", "onecycle", "cosine"]), default="step")
@click.option("--step-epochs", type=click.IntRange(1), default=30, help="Of --schedule step: rates then fall tenfold.")
@click.option("--label-smoothing", type=UNIT, default=0.0)
@click.option("--diversity", type=click.Choice(["code", "paper", "none"]), default="code", help="Form of that loss.")
@click.option("--clip-norm", type=Number(0, min_open=True), help="Largest gradient norm.")
@click.option("--flip/--no-flip", default=True, help="Random horizontal flips.")
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--workers", type=click.IntRange(0), default=2, help="Processes that decode images.")
@max_pixels_option
@click.option("--accelerator", default="auto", help="Lightning Fabric's name: auto, cpu, cuda, mps.")
@click.option("--devices", default="auto", help="How many of them; under torchrun, those it started.")
@click.option("--precision", type=click.Choice(["32-true", "bf16-mixed", "16-mixed"]), default="32-true")
@click.option("--compile/--no-compile", default=False, help="torch.compile the backbones.")
@click.option("--resume", type=PATH, help="A last.pt: continue that run with its options; --epochs may grow.")
@click.version_option(package_name="mge")
@reports_errors
def main(**options: Any) -> None:
    """Train a mixture of granularity-specific experts on a folder of images.

    The defaults are the paper's but for one: the box thresholds follow --crop-area, because the paper's 0.2 keeps 98 %
    of most images, which is no attention. --recipe paper brings it back.

    Ctrl-C, SIGTERM and SIGHUP end the run after the current step; --resume continues it.
    """
    # What can be checked without PyTorch is checked before it is loaded, which takes seconds.
    from mge.data.check import check_images
    from mge.data.splits import training_splits

    context = click.get_current_context()
    given = {name for name in options if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    resume: Path | None = options["resume"]
    config = None
    if resume is None:
        _complete(options)
    else:
        config = _take_up(resume, options, given)
    data, out = Path(options["data"]), Path(options["out"])
    first = _is_first_process()
    classes, train, val = training_splits(data, options["seed"], note if first else lambda _: None)
    if resume is None and not _is_own(options["init"]):
        config = _make_config(classes, options)
    elif config is not None and config.classes != classes:
        raise TrainingError(
            f"{resume} knows {config.num_classes} classes, the data folder has {len(classes)} others; "
            "expected the folder that the run started with; --init fine-tunes for other classes"
        )
    dry = options["dry_run"]
    moved = not dry and resume is not None and resume.resolve().parent != out.resolve()
    if not dry:
        _check_folder(out, replace=options["overwrite"] or (resume is not None and not moved))
    elif options["init"] == "timm":
        options["init"] = "none"  # nothing is downloaded for it
    if first:
        check_images({"train": train, "val": val}, classes, options["max_pixels"], note)

    from mge.data.folder import FolderDataset, TrainingDataset
    from mge.training.dry_run import Rehearsal
    from mge.training.loop import Trainer
    from mge.training.recipe import TrainOptions

    names = {field.name for field in fields(TrainOptions)}
    train_options = TrainOptions(**{name: value for name, value in options.items() if name in names})
    fabric = _make_fabric(options["accelerator"], options["devices"], train_options.precision)
    model, origin = _make_model(config, classes, options, given)
    config, pixels = model.config, options["max_pixels"]
    options |= {name: value for name, value in asdict(config).items() if name in options}  # for --resume
    with _claimed(out, claim=not dry and (first or fabric.world_size == 1)):
        if resume is not None and moved and first:
            _copy_best(resume.parent / "best.pt", out / "best.pt")
        _launch(fabric)  # last, so that what is refused is refused once: further processes begin this command anew
        if fabric.is_global_zero:
            echo(
                f"{len(train)} training and {len(val)} validation images of {len(classes)} classes; "
                f"{config.experts} x {config.arch} at {config.image_size} px{origin}"
            )
        if fabric.is_global_zero and not dry:
            echo("kept in best.pt: the latest epoch within one standard error of the highest validation accuracy")
        images = context.obj or TrainingDataset  # `main.main(arguments, obj=...)` trains on images of another making
        trainer = (Rehearsal if dry else Trainer)(
            model,
            images(train, config, seed=train_options.seed, flip=train_options.flip, max_pixels=pixels),
            FolderDataset(val, config, max_pixels=pixels),
            train_options,
            out,
            fabric,
            command={name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
        )
        progress = trainer.fit(resume)
    if isinstance(trainer, Rehearsal) and fabric.is_global_zero:
        if trainer.stopped_by:
            raise click.exceptions.Exit(128 + trainer.stopped_by)
        for line in trainer.report():
            echo(line)
    if dry or not fabric.is_global_zero:
        return  # with 0: Fabric kills the first process when another one fails
    if progress.epoch < train_options.epochs:
        echo(f"stopped in epoch {progress.epoch + 1}; go on with: mge-train --resume {out / 'last.pt'}")
        raise click.exceptions.Exit(128 + (trainer.stopped_by or signal.SIGINT))  # None: another process was told
    best = out / "best.pt"
    if not best.exists():
        raise TrainingError(
            f"no epoch of this run was kept, and the best.pt beside {resume} is gone; train on (--epochs)"
        )
    echo(f"{best}: validation accuracy {100 * progress.kept:.1f} %; export with: mge-export --ckpt {best}")


def _complete(options: dict[str, Any]) -> None:
    """Put the values that depend on others into the options of a new run."""
    from mge.archive import check_file
    from mge.config import PAPER_THRESHOLD

    if options["data"] is None:
        raise click.UsageError("missing option '--data'")
    options["data"] = options["data"].absolute()
    options["out"] = options["out"] or Path("runs/mge")
    if options["crop_area"] and options["box_threshold"]:
        raise click.UsageError("--box-threshold fixes what --crop-area moves; give one of them")
    if (given_areas := len(options["crop_area"])) not in (0, 1, options["experts"] - 1):
        raise click.UsageError(
            f"{given_areas} x --crop-area; expected one, or one for each of the {options['experts'] - 1} crops"
        )
    if options["recipe"] == "paper" and (options["crop_area"] or options["box_threshold"]):
        raise click.UsageError("--recipe paper fixes the box thresholds at the paper's; leave out the option for them")
    if options["recipe"] == "paper":
        options["box_threshold"] = (PAPER_THRESHOLD,)
    elif not options["crop_area"] and not options["box_threshold"]:
        options["crop_area"] = (CROP_AREA,)
    init = options["init"]
    if _is_own(init):
        check_file(Path(init))
    elif init.endswith(".safetensors") and not Path(init).is_file():
        raise CheckpointError(f"--init {init} is no file; expected timm, none, a .safetensors file or a checkpoint")


def _is_own(init: str) -> bool:
    """Whether --init names a checkpoint to fine-tune."""
    return init not in ("timm", "none") and not init.endswith(".safetensors")


def _take_up(resume: Path, options: dict[str, Any], given: set[str]) -> MGEConfig:
    """Put what a run was asked for into the options that are not given; returns its config.

    Raises:
        TrainingError: a given option differs, or the file holds no run.
    """
    from mge.archive import check_file, read_plain, taking_up
    from mge.config import MGEConfig

    check_file(resume)
    content = read_plain(resume)
    if not isinstance(content, dict) or "config" not in content:
        from mge.checkpoint import load_checkpoint

        load_checkpoint(resume)  # says what it is, where it is no model
        content = {}
    if "training" not in content:
        raise TrainingError(f"{resume} holds a model but no training state; expected last.pt of an unfinished run")
    config, training = MGEConfig.from_dict(content["config"]), content["training"]
    context = click.get_current_context()
    kinds = {parameter.name: parameter for parameter in context.command.params}
    with taking_up(resume):
        before = asdict(config) | training["options"] | training["command"]
        trained = int(training["options"]["epochs"])
    for name in options.keys() - {"out", "overwrite", "resume"}:
        if name not in given:
            try:
                options[name] = kinds[name].type_cast_value(context, before.get(name, options[name]))
            except (click.BadParameter, TypeError) as error:
                reason = getattr(error, "message", error)
                raise TrainingError(
                    f"{resume} was trained with a --{name.replace('_', '-')} that is none: {reason}; give it anew"
                ) from error
        elif name not in FREE and options[name] != before.get(name):
            option = "--" + name.replace("_", "-")
            raise TrainingError(
                f"{resume} was trained with {option} {before.get(name)}, now it is {options[name]}; leave the option "
                "out, or start another run without --resume"
            )
    if options["data"] is None:
        raise TrainingError(f"{resume} does not say where its images lie; add --data")
    if options["epochs"] < trained:
        raise TrainingError(
            f"{resume} was trained with epochs = {trained} (now {options['epochs']}); expected no fewer"
        )
    options["out"] = options["out"] or resume.parent
    return config


def _copy_best(old: Path, new: Path) -> None:
    """Copy the model that a run has kept so far to the folder where it goes on."""
    if old.is_file():
        with atomic_path(new) as part:
            shutil.copyfile(old, part)
    else:
        new.unlink(missing_ok=True)  # another run's


def _is_first_process() -> bool:
    """Whether this process speaks for all that were started together, as torchrun, Fabric and Slurm number them."""
    ranks = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ]
    return not ranks or ranks[0] == "0"


def _make_fabric(accelerator: str, devices: str, precision: str) -> Fabric:
    from lightning.fabric import Fabric

    placement: dict[str, Any] = {"devices": devices}
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun: take part in its group
        local = os.environ["LOCAL_WORLD_SIZE"]
        if devices not in ("auto", local):
            raise TrainingError(
                f"torchrun started {local} processes on this machine, --devices asks for {devices}; expected the same "
                "number, or no --devices"
            )
        placement = {"devices": int(local), "num_nodes": int(os.environ["GROUP_WORLD_SIZE"]), "strategy": "ddp"}
    try:
        return Fabric(accelerator=accelerator, precision=precision, **placement)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError, RuntimeError) as error:  # Fabric's ways to refuse an option or a missing device
        raise TrainingError(
            f"cannot train with --accelerator {accelerator} --devices {devices} --precision {precision}: "
            f"{brief(error)}; expected what this machine has, for instance --accelerator cpu"
        ) from error


def _launch(fabric: Fabric) -> None:
    """Start the other processes, where --devices asks for several."""
    try:
        fabric.launch()
    except (ValueError, RuntimeError) as error:
        raise TrainingError(
            f"cannot start {fabric.world_size} processes: {brief(error)}; expected a machine that can, or --devices 1"
        ) from error


def _check_folder(out: Path, *, replace: bool) -> None:
    """Check that a run can be written before it costs anything."""
    if (out / "last.pt").exists() and not replace:
        raise OutputError(
            f"{out} holds a run already; go on with it (--resume {out / 'last.pt'}), replace it (--overwrite) or name "
            "another folder with --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make folder {out}: {error.strerror}; name another with --out") from error
    check_writable(out / "last.pt")


@contextmanager
def _claimed(out: Path, *, claim: bool) -> Generator[None]:
    """Keep every other training out of a folder inside the block, however it was started.

    Raises:
        OutputError: another one is writing there.
    """
    if not claim or os.name == "nt":  # Windows has no lock on folders
        yield
        return
    import fcntl

    folder = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                lock(folder, wait=False)
            except BlockingIOError as error:
                raise OutputError(
                    f"another training is writing to {out}; wait for its end, or name another folder with --out"
                ) from error
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_UN)  # closing is not enough: data workers hold the folder, too
        os.close(folder)


def _make_config(classes: tuple[str, ...], options: dict[str, Any]) -> MGEConfig:
    """The config that the options ask for; whether features are normalized by default depends on the backbone."""
    from mge.config import PAPER_THRESHOLD, MGEConfig

    names = {field.name for field in fields(MGEConfig)}
    values = {name: value for name, value in options.items() if name in names and value is not None}
    if options["image_sizes"]:
        values["image_size"] = options["image_sizes"][0]
    values.setdefault("resize", (options["source_size"] or values["image_size"]) * 8 // 7)  # 512 for the paper's 448
    thresholds = options["box_threshold"] or (PAPER_THRESHOLD,)
    crops = options["experts"] - 1
    return MGEConfig(
        classes=classes, box_thresholds=thresholds * crops if len(thresholds) == 1 else thresholds, **values
    )


def _make_model(
    config: MGEConfig | None, classes: tuple[str, ...], options: dict[str, Any], given: set[str]
) -> tuple[MGENet, str]:
    """The model of --resume, or one that starts from --init, and what to say of its origin."""
    import torch

    from mge.backbones import has_linear_features
    from mge.checkpoint import fine_tuned, load_checkpoint
    from mge.config import MGEConfig
    from mge.model import MGENet, initialize_backbones

    if options["resume"] is not None:
        return load_checkpoint(options["resume"]), ""
    init = options["init"]
    torch.manual_seed(options["seed"])
    if config is None:
        names = {field.name for field in fields(MGEConfig)}
        changes = {name: options[name] for name in given & names}
        if options["box_threshold"]:
            changes["box_thresholds"] = options["box_threshold"]
        return fine_tuned(Path(init), classes, changes)
    if options["normalize_features"] is None:
        config = replace(config, normalize_features=has_linear_features(config.arch))
    model = MGENet(config)
    if init != "none":
        initialize_backbones(model, init)
    return model, ""


if __name__ == "__main__":
    main()
