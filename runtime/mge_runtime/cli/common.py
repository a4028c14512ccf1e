"""What all commands share."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import click

from mge_runtime.errors import InputError, MGEError, OutputError, one_line, printable

__all__ = ["GPU_STATUS", "at_most_cpus", "echo", "format_bytes", "note", "report", "reports_errors", "verbose_option"]

# The extra of the wheel that the commands of a package need besides the base install.
_EXTRAS = {"mge": "train", "mge_export": "export", "mge_calibration": "calibrate"}

# What is known of each backend on a GPU; docs/results.md and docs/performance.md say more.
GPU_STATUS = {
    "onnxruntime": "experimental: ran once, on an H100, before its last changes",
    "tensorrt": "experimental: not yet run",
    "tensorrt-rtx": "experimental: not yet run",
}

_P = ParamSpec("_P")
_R = TypeVar("_R")


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
                f'error: this command needs {package}, which is not installed; install it: pip install "mge[{extra}]"',
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


def note(line: str) -> None:
    """Say on standard error what is no error."""
    click.echo(f"note: {printable(line)}", err=True)


def report(error: MGEError) -> None:
    """Print one line about an error on standard error."""
    click.echo(f"error: {one_line(error)}", err=True)


def echo(text: str, *, nl: bool = True) -> None:
    """Print to standard output.

    Raises:
        OutputError: it is closed or cannot be written; a closed pipe (`| head`) passes, which click ends quietly.
    """
    stdout: object = sys.stdout  # None where the process was started without one
    if stdout is None:
        raise OutputError("cannot print: standard output is closed; name another place for the output")
    try:
        click.echo(text, nl=nl)
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python would try again at its end, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"cannot print: {error.strerror}; name another place for the output") from error


def at_most_cpus(context: click.Context, parameter: click.Parameter, value: int | None) -> int | None:
    """A callback of click: cut a number of threads to the processors that there are, and say so."""
    from mge_runtime.machine import cpu_count  # not above: help does without

    del context
    if value is None or value <= (count := cpu_count()):
        return value
    note(f"{parameter.opts[-1]} {value} is cut to {count}, the processors that this process may use")
    return count


def _ask_for_log(context: click.Context, parameter: click.Parameter, value: int) -> int:
    del context, parameter
    if value:
        os.environ["MGE_VERBOSE"] = str(min(value, 2))  # read where ONNX Runtime is imported, which comes later
    return value


# `-v`, `-vv`: the parameter `verbose` counts them.
verbose_option = click.option(
    "-v", "--verbose", count=True, callback=_ask_for_log, help="Show what the libraries say; -vv: all of it."
)


def format_bytes(count: int) -> str:
    """For example "98.0 MB" (1 MB = 1,000,000 bytes)."""
    if count < 1000:
        return f"{count} B"
    for unit in ("kB", "MB"):
        count_in_unit = count / (1e3 if unit == "kB" else 1e6)
        if count_in_unit < 999.95:
            return f"{count_in_unit:.1f} {unit}"
    return f"{count / 1e9:.2f} GB"
