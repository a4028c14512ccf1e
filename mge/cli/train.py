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

from mge.cli.train_options import check_areas, is_own, resolve, training_options, write_options
from mge.config import PAPER_THRESHOLD, MGEConfig
from mge.training.options import TrainOptions
from mge_runtime.cli.common import note, reports_errors
from mge_runtime.errors import OutputError, TrainingError, brief
from mge_runtime.files import atomic_path, check_folder, echo, lock

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from mge.model import MGENet


MODELS = ("last.pt", "best.pt")
WRITTEN = (*MODELS, "metrics.csv", "curves.png")


@click.command(context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]})
@training_options
@click.version_option(package_name="mge")
@reports_errors
def main(**options: Any) -> None:
    """Train a mixture of granularity-specific experts on a folder of images.

    The defaults are what measured best for its cost; --recipe paper trains as published.

    Ctrl-C, SIGTERM and SIGHUP end the run after the current step; --resume continues it.
    """
    # What can be checked without PyTorch is checked before it is loaded, which takes seconds.
    from mge.data.check import check_images
    from mge.data.splits import training_splits

    given, config = resolve(options)
    resume: Path | None = options["resume"]
    data, out = Path(options["data"]), Path(options["out"])
    first = _is_first_process()
    classes, train, val = training_splits(data, options["seed"], note if first else lambda _: None)
    if resume is None and not is_own(options["init"]):
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
    from mge.training.dry_run import DryRun
    from mge.training.loop import Trainer

    train_options = TrainOptions(**_of(TrainOptions, options))
    fabric = _make_fabric(options["accelerator"], options["devices"], train_options.precision)
    model, origin = _make_model(config, classes, options, given)
    config, pixels = model.config, options["max_pixels"]
    options |= {name: value for name, value in asdict(config).items() if name in options}  # for --resume and --config
    if first and config.experts == 1:
        for option, asked in (("--distill", train_options.distill), ("--sharing", "sharing" in given)):
            if asked:
                note(f"{option} does nothing for a single network; it is for --experts 2 and more")
    if first and train_options.gate_balance and (config.experts == 1 or config.gate == "none"):
        note("--gate-balance does nothing without a gate to train; it is for --gate network and shared")
    # `main.main(arguments, obj=...)` trains on images of another making.
    images = click.get_current_context().obj or TrainingDataset
    trainer = (DryRun if dry else Trainer)(
        model,
        images(train, config, train_options, max_pixels=pixels),
        FolderDataset(val, config, max_pixels=pixels),
        train_options,
        out,
        fabric,
        command={name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
    )
    with _claimed(out, claim=not dry and (first or fabric.world_size == 1)):
        if first and not dry:
            if resume is None or moved:  # files of two runs would lie side by side
                for name in WRITTEN:
                    (out / name).unlink(missing_ok=True)
            if resume is not None and moved and (kept := resume.parent / "best.pt").is_file():
                with atomic_path(out / "best.pt") as part:
                    shutil.copyfile(kept, part)
            usual = config.resize == _resize(config.frame_size)  # left out, so that it follows another --image-size
            write_options(out / "options.toml", options | {"resize": None if usual else config.resize})
        _launch(fabric)  # last, so that what is refused is refused once: further processes begin this command anew
        if fabric.is_global_zero:
            echo(
                f"{len(train)} training and {len(val)} validation images of {len(classes)} classes; "
                f"{config.experts} x {config.arch} at {', '.join(map(str, config.sizes))} px{origin}"
            )
        if fabric.is_global_zero and not dry:
            echo("kept in best.pt: the latest epoch within one standard error of the highest validation accuracy")
        progress = trainer.fit(resume)
    if isinstance(trainer, DryRun) and fabric.is_global_zero:
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
    if not replace and any((out / name).exists() for name in MODELS):
        go_on = f"go on with it (--resume {last}), " if (last := out / "last.pt").exists() else ""
        raise OutputError(
            f"{out} holds a run already; {go_on}replace it (--overwrite) or name another folder with --out"
        )
    check_folder(out)


@contextmanager
def _claimed(out: Path, *, claim: bool) -> Generator[None]:
    """Make a folder and keep every other training out of it inside the block, however it was started.

    Raises:
        OutputError: it cannot be made, or another one is writing there.
    """
    if claim:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make folder {out}: {error.strerror}; name another with --out") from error
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


def _of(kind: type[MGEConfig | TrainOptions], options: dict[str, Any]) -> dict[str, Any]:
    """The options that are fields of a dataclass."""
    return {field.name: options[field.name] for field in fields(kind) if field.name in options}


def _resize(frame_size: int) -> int:
    """The shorter side before a frame is cropped, in pixels, unless --resize says another: the paper's 512 for 448."""
    return frame_size * 8 // 7


def _make_config(classes: tuple[str, ...], options: dict[str, Any]) -> MGEConfig:
    """The config that the options ask for; whether features are normalized by default depends on the backbone."""
    values = {name: value for name, value in _of(MGEConfig, options).items() if value is not None}
    if options["image_sizes"]:
        values["image_size"] = options["image_sizes"][0]
    values.setdefault("resize", _resize(options["source_size"] or values["image_size"]))
    thresholds = options["box_threshold"] or (PAPER_THRESHOLD,)
    crops = options["experts"] - 1
    check_areas(options["crop_area"], options["experts"])
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
    from mge.model import MGENet, initialize_backbones

    if options["resume"] is not None:
        return load_checkpoint(options["resume"]), ""
    init = options["init"]
    torch.manual_seed(options["seed"])
    if config is None:
        changes = {name: value for name, value in _of(MGEConfig, options).items() if name in given}
        if options["box_threshold"]:
            changes["box_thresholds"] = options["box_threshold"]
        model, origin = fine_tuned(Path(init), classes, changes)
        check_areas(options["crop_area"], model.config.experts)
        return model, origin
    linear = has_linear_features(config.arch)  # always: it draws random numbers, and an option shall not change others
    if options["normalize_features"] is None:
        config = replace(config, normalize_features=linear)
    model = MGENet(config)
    if init != "none":
        initialize_backbones(model, init)
    return model, ""


if __name__ == "__main__":
    main()
