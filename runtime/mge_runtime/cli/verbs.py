"""`mge`: every command as a verb of one, and files that hold their options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, distribution
from pathlib import Path
from typing import Any, cast

import click

from mge_runtime.cli.common import reports_errors
from mge_runtime.errors import InputError, brief


class _Verbs(click.Group):
    """The scripts `mge-...` of this distribution, each imported when it is asked for."""

    @cached_property
    def scripts(self) -> dict[str, EntryPoint]:
        points = distribution("mge").entry_points
        return {point.name.removeprefix("mge-"): point for point in points if point.name.startswith("mge-")}

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.scripts)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        return self.scripts[cmd_name].load() if cmd_name in self.scripts else None


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Options of the verbs, in a table for each: [run] threads = 2. Those of the command line go before them.",
)
@click.version_option(package_name="mge")
@click.pass_context
@reports_errors
def main(context: click.Context, config: Path | None) -> None:
    """Train, export and run mixtures of granularity-specific experts: `mge run` is `mge-run`, and so on."""
    if config is None:
        return
    context.default_map = {}
    for verb, table in read_toml(config).items():
        command = main.get_command(context, verb)
        if command is None or not isinstance(table, dict):
            raise InputError(f"{config}: {verb!r} is no table of a verb of mge; mge -h lists them")
        own = click.Context(command, info_name=f"mge {verb}")
        context.default_map[verb] = options_of(cast("dict[str, Any]", table), own, str(config))


def read_toml(path: Path) -> dict[str, Any]:
    """What a file of options holds.

    Raises:
        InputError: it cannot be read, or this Python is older than 3.11.
    """
    try:  # not above: without a file, the command line can be read by the Pythons of devices
        tomllib: Any = import_module("tomllib")
    except ModuleNotFoundError as error:
        raise InputError("cannot read --config: this Python has no tomllib; it needs 3.11 or newer") from error
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot read --config {path}: {brief(error)}; expected a TOML file") from error


def options_of(table: Mapping[str, Any], context: click.Context, place: str) -> dict[str, Any]:
    """The values of a command's options in a table, by parameter, each as its option reads it.

    Args:
        table: options by name, spelled with "-" or "_".
        context: of the command.
        place: where the table stands, for messages.

    Raises:
        InputError: a key is no option, or its option refuses the value.
    """
    kinds = {word[2:]: parameter for parameter in context.command.params for word in parameter.opts if word[:2] == "--"}
    kinds.pop("config", None)
    values: dict[str, Any] = {}
    for key, value in table.items():
        kind = kinds.get(key.replace("_", "-"))
        if not isinstance(kind, click.Option) or not kind.expose_value:
            name = context.command_path
            raise InputError(f"{place}: {key!r} is no option of {name}; {name} -h lists them")
        if isinstance(value, dict):
            raise InputError(f"{place}: {key} is a table; expected a value of the option --{key}")
        try:
            values[str(kind.name)] = kind.type_cast_value(context, _as_words(value, kind))
        except click.BadParameter as error:
            raise InputError(f"{place}: {key} is {json.dumps(value, default=str)}: {error.message}") from error
    return values


def _as_words(value: Any, option: click.Option) -> Any:
    """A TOML value as the command line would spell it, so that 1.5 is no integer and "yes" no number."""
    if not isinstance(value, list):
        return [str(value)] if option.multiple else str(value)
    words = [str(one) for one in cast("list[Any]", value)]
    return words if option.multiple or option.nargs > 1 else ",".join(words)


if __name__ == "__main__":
    main()
