"""`mge-train`: train a mixture of granularity-specific experts on a folder of images."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mge_runtime.cli.common import note, reports_errors

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from mge.model import MGENet

__all__ = ["main"]

PATH = click.Path(path_type=Path)
UNIT = click.FloatRange(0, 1, max_open=True)


@click.command(context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.option("--data", type=PATH, required=True, help="Folder with train/<class>/*.jpg and, if you have it, val/.")
@click.option(
    "--out", type=PATH, default=None,
    help="Folder for best.pt, last.pt, metrics, curves.  [default: runs/mge, or that of --resume]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the run that --out holds.")
@click.option("--arch", default="resnet50", help="timm trunk; any CNN with features at strides 16 and 32.")
@click.option("--init", default="timm", metavar="timm|none|FILE", help="ImageNet weights for the trunks.")
@click.option("--experts", type=click.IntRange(1), default=3, help="Experts in the chain; 1 trains a single network.")
@click.option(
    "--image-size", type=click.IntRange(32), default=448,
    help="Pixels, the side of every expert's input. Attention maps have a cell for every 32: 224 gives 7 x 7 cells, "
    "fewer than 5 a side place crops only roughly.",
)  # fmt: skip
@click.option("--resize", type=int, default=None, help="Pixels, the shorter side.  [default: 8/7 of it]")
@click.option("--mean", type=float, nargs=3, default=(0.5, 0.5, 0.5), help="Of RGB in [0, 1].")
@click.option("--std", type=float, nargs=3, default=(0.5, 0.5, 0.5), help="Of RGB in [0, 1].")
@click.option("--box-threshold", type=UNIT, multiple=True, help="Once, or once for each crop.  [default: 0.2]")
@click.option(
    "--crop-area", type=click.FloatRange(0, 1, min_open=True), default=None,
    help="Let the thresholds follow the median share that each crop keeps of its image on the validation images.",
)  # fmt: skip
@click.option("--parts-per-class", type=click.IntRange(1), default=10, help="Channels of the part convolution.")
@click.option(
    "--normalize-features/--plain-features", default=None, help="BatchNorm before the heads.  [default: where needed]"
)
@click.option("--epochs", type=click.IntRange(1), default=100)
@click.option("--batch-size", type=click.IntRange(2), default=10)
@click.option("--head-lr", type=click.FloatRange(0, min_open=True), default=0.01)
@click.option("--trunk-lr", type=click.FloatRange(0), default=0.001)
@click.option("--weight-decay", type=click.FloatRange(0), default=1e-4)
@click.option("--schedule", type=click.Choice(["step", "onecycle", "cosine"]), default="step")
@click.option("--step-epochs", type=click.IntRange(1), default=30, help="Rates fall tenfold every so many (step).")
@click.option("--label-smoothing", type=UNIT, default=0.0)
@click.option("--diversity", type=click.Choice(["code", "paper", "none"]), default="code", help="Form of the KL terms.")
@click.option("--clip-norm", type=click.FloatRange(0, min_open=True), default=None, help="Largest gradient norm.")
@click.option("--flip/--no-flip", default=True, help="Random horizontal flips.")
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--workers", type=click.IntRange(0), default=2, help="Processes that decode images.")
@click.option("--accelerator", default="auto", help="Lightning Fabric's name: auto, cpu, cuda, mps.")
@click.option("--devices", default="auto", help="How many of them.")
@click.option("--precision", type=click.Choice(["32-true", "bf16-mixed", "16-mixed"]), default="32-true")
@click.option("--resume", type=PATH, default=None, help="A last.pt: go on exactly where that run stood.")
@click.version_option(package_name="mge")
@reports_errors
def main(
    data: Path,
    out: Path | None,
    overwrite: bool,
    resume: Path | None,
    accelerator: str,
    devices: str,
    **options: Any,
) -> None:
    """Train a mixture of granularity-specific experts on a folder of images; the defaults are the paper's."""
    from mge.data.folder import FolderDataset, TrainingDataset
    from mge.training.loop import Trainer
    from mge.training.options import TrainOptions
    from mge.training.splits import training_splits
    from mge_runtime.sources import validation_folder

    names = [field.name for field in fields(TrainOptions)]
    train_options = TrainOptions(**{name: options.pop(name) for name in names if name in options})
    if resume is not None:
        _refuse_model_options(options)
    fabric = _make_fabric(accelerator, devices, train_options.precision)
    say = note if fabric.is_global_zero else lambda _: None
    classes, train, val = training_splits(data, train_options.seed, say)
    model = _make_model(classes, resume, train_options.seed, **options)
    out = out or (resume.parent if resume is not None else Path("runs/mge"))
    _make_folder(out, replace=overwrite or resume is not None)
    _launch(fabric)  # last, so that what is refused is refused once: further processes begin this command anew
    if fabric.is_global_zero:
        if validation_folder(data) is None:
            click.echo(f"no {data / 'val'}: {len(val)} of the training images are held out for validation")
        click.echo(
            f"{len(train)} training and {len(val)} validation images of {len(classes)} classes; "
            f"{model.config.experts} x {model.config.arch} at {model.config.image_size} px"
        )
    training_set = TrainingDataset(train, model.config, seed=train_options.seed, flip=train_options.flip)
    validation_set = FolderDataset(val, model.config)
    progress = Trainer(model, training_set, validation_set, train_options, out, fabric).fit(resume)
    if not fabric.is_global_zero:
        return  # with 0: Fabric kills the first process when another one fails
    if progress.epoch < train_options.epochs:
        click.echo(f"stopped in epoch {progress.epoch + 1}; go on with --resume {out / 'last.pt'}")
        raise click.exceptions.Exit(130)
    best = out / "best.pt"
    click.echo(f"{best}: validation accuracy {100 * progress.kept:.1f} %; export with: mge-export --ckpt {best}")


def _make_fabric(accelerator: str, devices: str, precision: str) -> Fabric:
    from lightning.fabric import Fabric

    from mge_runtime.errors import TrainingError

    try:
        return Fabric(accelerator=accelerator, devices=devices, precision=precision)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError, RuntimeError) as error:  # Fabric's ways to refuse an option or a missing device
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"cannot train with --accelerator {accelerator} --devices {devices} --precision {precision}: {reason}; "
            "expected what this machine has, for instance --accelerator cpu"
        ) from error


def _launch(fabric: Fabric) -> None:
    """Start the other processes, where --devices asks for several."""
    from mge_runtime.errors import TrainingError

    try:
        fabric.launch()
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"cannot start {fabric.world_size} processes: {reason}; expected a machine that can, or --devices 1"
        ) from error


def _make_folder(out: Path, *, replace: bool) -> None:
    """Make sure that a run can be written before it costs anything."""
    from mge_runtime.errors import OutputError
    from mge_runtime.files import atomic_path

    if (out / "last.pt").exists() and not replace:
        raise OutputError(
            f"{out} holds a run already; go on with it (--resume {out / 'last.pt'}), replace it (--overwrite) or name "
            "another folder with --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make folder {out}: {error.strerror}; name another with --out") from error
    with atomic_path(out / "probe"):
        pass
    (out / "probe").unlink(missing_ok=True)  # another process of this run may have been quicker


def _refuse_model_options(options: dict[str, Any]) -> None:
    """A resumed run has the model of its checkpoint: options that would describe another one are a mistake."""
    from mge_runtime.errors import TrainingError

    context = click.get_current_context()
    given = [name for name in options if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    given = [name for name in given if name != "init"]
    if given:
        raise TrainingError(
            f"--resume takes the model from the checkpoint; leave out --{given[0].replace('_', '-')} (found {given})"
        )


def _make_model(
    classes: tuple[str, ...],
    resume: Path | None,
    seed: int,
    *,
    init: str,
    arch: str,
    experts: int,
    image_size: int,
    resize: int | None,
    box_threshold: tuple[float, ...],
    parts_per_class: int,
    normalize_features: bool | None,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> MGENet:
    """A model that starts from `init`, or the one in the checkpoint that the run resumes from."""
    import torch

    from mge.checkpoint import load_checkpoint
    from mge.config import PAPER_THRESHOLD, MGEConfig
    from mge.model import MGENet
    from mge.pretrained import has_linear_features, initialize_trunks
    from mge_runtime.errors import TrainingError

    if resume is not None:
        model = load_checkpoint(resume)
        if model.config.classes != classes:
            raise TrainingError(
                f"{resume} knows {model.config.num_classes} classes, the data folder has {len(classes)} others; "
                "expected the folder that the run started with"
            )
        return model
    thresholds = box_threshold or (PAPER_THRESHOLD,)
    config = MGEConfig(
        arch=arch,
        classes=classes,
        experts=experts,
        image_size=image_size,
        resize=resize if resize is not None else image_size * 8 // 7,  # 512 for the paper's 448
        mean=mean,
        std=std,
        box_thresholds=thresholds * (experts - 1) if len(thresholds) == 1 else thresholds,
        parts_per_class=parts_per_class,
        normalize_features=has_linear_features(arch) if normalize_features is None else normalize_features,
    )
    torch.manual_seed(seed)
    model = MGENet(config)
    if init != "none":
        initialize_trunks(model, init)
    return model


if __name__ == "__main__":
    main()
