"""Options and reports of errors that the commands share."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict, TypeVar

import click
from click.core import ParameterSource

from mge_runtime.errors import InputError, MGEError, one_line, printable
from mge_runtime.machine import cpu_count, install_extra
from mge_runtime.sources import MAX_PIXELS

if TYPE_CHECKING:
    from mge_runtime.chain import Exit


# The extra of the wheel that the commands of a package need besides the base install.
_EXTRAS = {"mge": "train", "mge_export": "export", "mge_calibration": "calibrate"}

# What is known of each backend on a GPU; docs/lab/ says more.
GPU_STATUS = {
    "onnxruntime": "experimental: ran once, on an H100, before its last changes",
    "tensorrt": "experimental: not yet run",
    "tensorrt-rtx": "experimental: not yet run",
}

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Number(click.FloatRange):
    """A range of finite numbers: `FloatRange` lets "nan" pass, and infinity where a bound is missing."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse; a usage error for what is not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number; expected one in the range {self._describe_range()}.", param, ctx)
        return number


def reports_errors(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Print an `MGEError`, or what is not installed, as one line on standard error and exit with 1.

    Every other exception passes.

    Goes between click's decorators and the function:

        @click.command()
        @reports_errors
        def main() -> None: ...
    """

    @functools.wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if reconfigure := getattr(sys.stdout, "reconfigure", None):
            reconfigure(errors="replace")  # a class name that the terminal's encoding lacks is no reason to stop
        try:
            _require_working_folder()
            return command(*args, **kwargs)
        except MGEError as error:
            report(error)
            raise SystemExit(1) from error
        except ModuleNotFoundError as error:
            package, spec = (error.name or "mge").partition(".")[0], sys.modules[command.__module__].__spec__
            extra = _EXTRAS.get((spec.name if spec else command.__module__).partition(".")[0])
            if extra is None or package.startswith("mge"):  # no extra would bring it: a defect
                raise
            click.echo(
                f"error: this command needs {package}, which is not installed; {install_extra(extra)}",
                err=True,
            )
            raise SystemExit(1) from error

    return wrapped


def _require_working_folder() -> None:
    """Refuse a working folder that was removed: no relative path can be found from there."""
    try:
        os.getcwd()  # noqa: PTH109 - Path would have to be imported for it
    except OSError as error:
        raise InputError(f"cannot work in this folder: {error.strerror}; expected one that exists, cd to it") from error


def say(line: str) -> None:
    """Print progress on standard error; nobody there to read it is no reason to stop."""
    with suppress(OSError):
        click.echo(line, err=True)


def note(line: str) -> None:
    """Say on standard error what is no error."""
    click.echo(f"note: {printable(line)}", err=True)


def report(error: MGEError) -> None:
    """Print one line about an error on standard error."""
    click.echo(f"error: {one_line(error)}", err=True)


def at_most_cpus(context: click.Context, parameter: click.Parameter, value: int | None) -> int | None:
    """A callback of click: cut a number of threads to the processors that there are, and say so."""
    del context
    if value is None or value <= (count := cpu_count()):
        return value
    note(f"{parameter.opts[-1]} {value} is cut to {count}, the processors that this process may use")
    return count


def options_given(*parameters: str) -> list[str]:
    """Those of a command's parameters that its command line gives, as they are written there: "--batch"."""
    context = click.get_current_context()
    return [
        parameter.opts[-1]
        for parameter in context.command.params
        if parameter.name in parameters
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        and context.params[parameter.name] != ()  # click before 8.3 says so of no IMAGES, too
    ]


def _ask_for_log(context: click.Context, parameter: click.Parameter, value: int) -> int:
    del context, parameter
    if value:
        os.environ["MGE_VERBOSE"] = str(min(value, 2))  # read where ONNX Runtime is imported, which comes later
    return value


def _exit(context: click.Context, parameter: click.Parameter, value: str) -> Exit:
    """Read "calibrated", "never" or the number of a graph."""
    if value == "never" or value == "calibrated":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(
            f'{value!r} is neither "calibrated" nor "never" nor a number from 1 on', context, parameter
        )
    return int(value)


# What several commands take; each option is the same in all of them.
max_pixels_option = click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=MAX_PIXELS,
    show_default="65 million",
    help="The most an image may have: memory is bounded by it, up to 30 bytes a pixel.",
)
exit_option = click.option(
    "--exit",
    "exit_at",
    callback=_exit,
    default="never",
    show_default=True,
    metavar="calibrated|never|N",
    help="Stop early: as soon as it is confident enough (mge-calibrate learns when), or after expert N.",
)
_OPENING = (
    click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda (the first GPU), cuda:1 or 1, ..."
    ),
    click.option("--backend", default="auto", show_default=True, help="auto, onnxruntime, tensorrt, tensorrt-rtx."),
    click.option(
        "-j",
        "--threads",
        type=click.IntRange(min=1),
        callback=at_most_cpus,
        help="Processors to compute with on the CPU.  [default: all]",
    ),
    click.option(
        "--no-mmap",
        is_flag=True,
        help="Load the weights instead of mapping them: the bundle may be overwritten meanwhile.",
    ),
    max_pixels_option,
)
engine_batch_option = click.option(
    "--batch", default="1,1,8", show_default=True, metavar="MIN,OPT,MAX", help="Batch sizes that engines are built for."
)


def batch_option(default: int, *names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """`-b`, `--batch`, and further names of it, for commands that run one batch size."""
    help = "Images in one run."
    return click.option(
        "-b", *names, "--batch", "batch", type=click.IntRange(min=1), default=default, show_default=True, help=help
    )


# `-v`, `-vv`: the parameter `verbose` counts them.
verbose_option = click.option(
    "-v", "--verbose", count=True, callback=_ask_for_log, help="Show what the libraries say; -vv: all of it."
)


class Opening(TypedDict):
    """How a bundle is opened, as for `Pipeline.open`."""

    device: str
    backend: str
    threads: int | None
    mmap: bool
    max_pixels: int


def opening_options(command: Callable[..., _R]) -> Callable[..., _R]:
    """The options of every command that runs a bundle, which gets them together as `opening`."""

    @functools.wraps(command)
    def wrapped(*, device: str, backend: str, threads: int | None, no_mmap: bool, max_pixels: int, **others: Any) -> _R:
        opening = Opening(device=device, backend=backend, threads=threads, mmap=not no_mmap, max_pixels=max_pixels)
        return command(opening=opening, **others)

    for option in reversed(_OPENING):
        wrapped = option(wrapped)
    return wrapped
