"""The options of `mge-train`, and where their values come from: command line, file, recipe, the run that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mge.archive import check_file, read_plain, taking_up
from mge.config import GATES, SHARINGS, MGEConfig
from mge.training.options import AUGMENTATIONS, CROP_AREA, OPTIMIZERS, RECIPES, TrainOptions, smaller_later
from mge_runtime.cli.common import Number, max_pixels_option
from mge_runtime.cli.verbs import options_of, read_toml
from mge_runtime.errors import CheckpointError, TrainingError
from mge_runtime.files import atomic_path

PATH = click.Path(path_type=Path)
UNIT = Number(0, 1, max_open=True)
PLACES = frozenset({"out", "overwrite", "dry_run", "resume", "config"})  # where a run is kept, not what it does
# What may differ from the run that --resume goes on with; of --epochs, more.
FREE = PLACES | {"data", "epochs", "workers", "max_pixels", "accelerator", "devices", "compile"}
# One of each decides for both: what crops keep, what experts see.
RIVALS = (frozenset({"box_threshold", "crop_area"}), frozenset({"image_size", "image_sizes"}))


class Sizes(click.ParamType):
    """Pixels separated by commas."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse; a usage error for what are no numbers."""
        if not isinstance(value, str):
            return value
        try:
            return tuple(int(side) for side in value.split(",")) if value else ()
        except ValueError:
            self.fail(f"found {value!r}; expected pixels separated by commas, as 448,224,224", param, ctx)


def _field(name: str, kind: Any, help: str | None = None) -> Callable[..., Any]:
    """An option that is a field of `TrainOptions` or `MGEConfig`; the default is the recipe's, or the field's."""
    field = name.removeprefix("--").partition("/")[0].replace("-", "_")
    default = RECIPES["modern"].get(field, getattr(TrainOptions if hasattr(TrainOptions, field) else MGEConfig, field))
    return click.option(name, type=kind, default=default, help=help)


_OPTIONS = (
    click.option(
        "--data",
        type=PATH,
        help="Folder with train/<class>/*.jpg and, if you have it, val/; or a downloaded data set (CUB-200-2011, "
        "NABirds, FGVC-Aircraft, ...), or a table of paths and labels (.csv, .parquet).  [a new run: required]",
    ),
    click.option("--out", type=PATH, help="Folder for what the run writes.  [default: runs/mge, or that of --resume]"),
    click.option("--overwrite", is_flag=True, help="Replace the run that --out holds."),
    click.option(
        "--dry-run", is_flag=True, help="Check the images, time a few steps, say what the run costs; write nothing."
    ),
    click.option(
        "--config",
        type=PATH,
        metavar="FILE.toml",
        help="Options by name, such as the options.toml of a run; those of the command line go before them. Paths are "
        "relative to the current folder.",
    ),
    click.option(
        "--recipe",
        type=click.Choice(list(RECIPES)),
        default="modern",
        help="Values of options that are not given. modern: the defaults below; paper: as published.",
    ),
    click.option("--arch", default="resnet50", help="timm backbone; any CNN with features at strides 16 and 32."),
    click.option(
        "--init",
        default="timm",
        metavar="timm|none|FILE",
        help="Weights to start from. timm: ImageNet's, downloaded; FILE.safetensors: a backbone's; FILE.pt: fine-tune "
        "that checkpoint; none: random.",
    ),
    _field("--experts", click.IntRange(1), "Experts in the chain; 1 trains a single network."),
    _field(
        "--gate",
        click.Choice(GATES),
        "What weighs the experts. network: a backbone of its own (the paper's); shared: a linear layer over what the "
        "experts saw; none: fixed weights, learned on the validation images.",
    ),
    _field(
        "--sharing",
        click.Choice(SHARINGS),
        "backbone: one for all experts, with heads of their own; a gate of its own network keeps that.",
    ),
    _field("--gate-balance", Number(0), "Weight of the loss term that keeps a gate from trusting one expert alone."),
    _field(
        "--image-size",
        click.IntRange(32),
        "Side of the first expert's input in pixels; from 160 on, attention maps are fine enough to place crops well.",
    ),
    click.option(
        "--image-sizes",
        type=Sizes(),
        metavar="S1,S2,...",
        help="Side of each expert's input.  [default: 5/7 of --image-size for later experts, in steps of 32; --recipe "
        "paper: the same for all]",
    ),
    _field(
        "--source-size",
        click.IntRange(0),
        "Crops are cut from a frame of this side, a multiple of --image-size, so that they show what the first expert "
        "does not see; 0: each from the image of the expert before.",
    ),
    click.option(
        "--resize", type=int, help="Shorter side before the crop of the frame, pixels.  [default: 8/7 of the frame's]"
    ),
    click.option("--mean", type=float, nargs=3, default=MGEConfig.mean, help="Mean of RGB in [0, 1]."),
    click.option("--std", type=float, nargs=3, default=MGEConfig.std, help="Deviation of RGB in [0, 1]."),
    click.option(
        "--box-threshold",
        type=UNIT,
        multiple=True,
        help="Fixed box threshold, once or once for each crop.  [default: thresholds follow --crop-area]",
    ),
    click.option(
        "--crop-area",
        type=Number(0, 1, min_open=True),
        multiple=True,
        help="Share of its image that the median crop keeps, once or for each crop; box thresholds are set to it after "
        f"each epoch, on the validation images.  [default: {CROP_AREA}]",
    ),
    _field("--parts-per-class", click.IntRange(1), "Channels of the part convolution."),
    click.option(
        "--normalize-features/--plain-features", default=None, help="BatchNorm before heads.  [default: where needed]"
    ),
    _field("--epochs", click.IntRange(1)),
    _field("--batch-size", click.IntRange(2), "Images in a step of each process."),
    _field("--optimizer", click.Choice(OPTIMIZERS), "timm's; sgd: momentum 0.9. Each wants learning rates of its own."),
    _field("--head-lr", Number(0, min_open=True), "Learning rate of the heads."),
    _field("--backbone-lr", Number(0), "Learning rate of the backbones."),
    _field(
        "--layer-decay",
        Number(0, 1, min_open=True),
        "A backbone's learning rate falls by this factor from each layer to the one before it.",
    ),
    _field(
        "--freeze",
        click.IntRange(0),
        "Backbones keep their weights and statistics up to their features of this stride; 4: half the time of a step.",
    ),
    _field("--weight-decay", Number(0)),
    _field("--schedule", click.Choice(["step", "onecycle", "cosine"])),
    _field("--step-epochs", click.IntRange(1), "Of --schedule step: rates then fall tenfold."),
    _field("--warmup-epochs", Number(0), "Of --schedule step and cosine: rates rise from nearly 0 so long."),
    _field("--ema", UNIT, "Decay of a moving average of the weights, which is what is validated and kept; 0: none."),
    _field("--label-smoothing", UNIT),
    _field("--diversity", click.Choice(["code", "paper", "none"]), "Form of that loss."),
    _field(
        "--distill",
        Number(0, 1),
        "Weight of loss terms by which all experts but the last follow the mixture in the last third of the epochs, so "
        "that early exits come earlier.",
    ),
    _field("--clip-norm", Number(0, min_open=True), "Largest gradient norm."),
    _field("--flip/--no-flip", None, "Random horizontal flips."),
    _field("--augment", click.Choice(AUGMENTATIONS), "trivial: TrivialAugment; rand: RandAugment."),
    _field("--erasing", Number(0, 1), "Probability that a random rectangle of an image is erased."),
    _field("--seed", click.IntRange(0, 2**32 - 1)),
    _field("--workers", click.IntRange(0), "Processes that decode images."),
    max_pixels_option,
    click.option("--accelerator", default="auto", help="Lightning Fabric's name: auto, cpu, cuda, mps."),
    click.option("--devices", default="auto", help="How many of them; under torchrun, those it started."),
    _field("--precision", click.Choice(["32-true", "bf16-mixed", "16-mixed"])),
    _field("--compile/--no-compile", None, "torch.compile the backbones."),
    click.option("--resume", type=PATH, help="A last.pt: continue that run with its options; --epochs may grow."),
)


def training_options(command: Any) -> Any:
    """Decorate a function with all options of `mge-train`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def resolve(options: dict[str, Any]) -> tuple[set[str], MGEConfig | None]:
    """Put the values of --config, of the run of --resume or the recipe into the options that are not given, in place.

    A value of the command line goes before one of the file, that before one of the recipe. PyTorch is not needed.

    Returns:
        The names that the command line or the file gives, and the model's config where a run goes on.

    Raises:
        InputError: the file cannot be read, has an unknown key or a value that its option refuses.
        TrainingError: a given option differs from the run's, or --resume names none.
        click.UsageError: options contradict each other, or one is missing.
    """
    context = click.get_current_context()
    sources = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    given = {name for name in options if context.get_parameter_source(name) in sources}
    if (path := options["config"]) is not None:
        content = options_of(read_toml(path), context, str(path))
        if "recipe" in given and (recipe := content.get("recipe", options["recipe"])) != options["recipe"]:
            raise click.UsageError(
                f"--recipe {options['recipe']} would change nothing that {path} names, which is of recipe {recipe}; "
                "leave --recipe out, or take it without --config"
            )
        given |= _fill(options, given, content)
    size, sizes = options["image_size"], options["image_sizes"]
    if {"image_size", "image_sizes"} <= given and sizes and sizes[0] != size:
        raise click.UsageError(
            f"--image-size {size} is not the first of --image-sizes {','.join(map(str, sizes))}; give one of them"
        )
    if options["resume"] is not None:
        return given, _take_up(options["resume"], options, given)
    _fill(options, given, RECIPES[options["recipe"]])
    _complete(options)
    return given, None


def write_options(path: Path, options: Mapping[str, Any]) -> None:
    """Write a run's options as TOML that --config reads."""
    lines = [
        f"{name.replace('_', '-')} = {json.dumps(value, ensure_ascii=False, default=str)}\n"  # these values: as in TOML
        for name, value in sorted(options.items())
        if value is not None and name not in PLACES
    ]
    with atomic_path(path) as part:
        part.write_text("".join(lines), "utf-8", "backslashreplace")


def check_areas(areas: Sequence[float], experts: int) -> None:
    """Refuse another number of --crop-area than the chain has crops; it is the chain of the file that --init names."""
    if len(areas) not in (0, 1, experts - 1):
        raise click.UsageError(f"{len(areas)} x --crop-area; expected one, or one for each of the {experts - 1} crops")


def is_own(init: str) -> bool:
    """Whether --init names a checkpoint to fine-tune."""
    return init not in ("timm", "none") and not init.endswith(".safetensors")


def _fill(options: dict[str, Any], given: set[str], values: Mapping[str, Any]) -> set[str]:
    """Put values into the options that neither are given nor have a rival that is; returns the names of these."""
    taken = given.union(*(rivals for rivals in RIVALS if given & rivals))
    names = values.keys() - taken
    options |= {name: values[name] for name in names}
    return names


def _complete(options: dict[str, Any]) -> None:
    """Check the options of a new run against each other, and put in the values that depend on others."""
    if options["data"] is None:
        raise click.UsageError("missing option '--data'")
    options["data"] = options["data"].absolute()
    options["out"] = options["out"] or Path("runs/mge")
    if options["crop_area"] and options["box_threshold"]:
        raise click.UsageError("--box-threshold fixes what --crop-area moves; give one of them")
    init = options["init"]
    if options["recipe"] != "paper" and not options["image_sizes"] and not is_own(init) and options["experts"] > 1:
        options["image_sizes"] = smaller_later(options["image_size"], options["experts"])
    if is_own(init):
        check_file(Path(init))
    elif init.endswith(".safetensors") and not Path(init).is_file():
        raise CheckpointError(f"--init {init} is no file; expected timm, none, a .safetensors file or a checkpoint")


def _take_up(resume: Path, options: dict[str, Any], given: set[str]) -> MGEConfig:
    """Put what a run was asked for into the options that are not given; returns its config.

    Raises:
        TrainingError: a given option differs, or the file holds no run.
    """
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
    for name in options.keys() - PLACES:
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
