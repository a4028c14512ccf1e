"""What all commands share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import click

from mge_runtime.errors import MGEError

__all__ = ["format_bytes", "note", "reports_errors"]

# The extra of the wheel that the commands of a package need besides the base install.
_EXTRAS = {"mge": "train", "mge_export": "export", "mge_calibration": "calibrate"}

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
        try:
            return command(*args, **kwargs)
        except MGEError as error:
            click.echo("error: " + " ".join(str(error).split()), err=True)
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


def note(line: str) -> None:
    """Say on standard error what is no error."""
    from mge_runtime.report import printable

    click.echo("note: " + printable(line), err=True)


def format_bytes(count: int) -> str:
    """For example "98.0 MB" (1 MB = 1,000,000 bytes)."""
    if count < 1000:
        return f"{count} B"
    for unit in ("kB", "MB"):
        count_in_unit = count / (1e3 if unit == "kB" else 1e6)
        if count_in_unit < 999.95:
            return f"{count_in_unit:.1f} {unit}"
    return f"{count / 1e9:.2f} GB"
