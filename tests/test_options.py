"""What several commands take is one option: the same spelling, type, default and help wherever it is."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

COMMANDS = {
    "run": "mge_runtime.cli.run",
    "serve": "mge_runtime.cli.serve",
    "bench": "mge_runtime.cli.bench",
    "build": "mge_runtime.cli.build",
    "calibrate": "mge_calibration.cli",
    "eval": "mge.cli.evaluate",
    "train": "mge.cli.train",
    "export": "mge_export.cli",
}
RUNNING = {"run", "serve", "bench", "calibrate", "eval"}


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("device", RUNNING),
        ("backend", RUNNING),
        ("threads", RUNNING),
        ("no_mmap", RUNNING),
        ("max_pixels", RUNNING | {"train", "export"}),
        ("exit_at", {"run", "serve"}),
        ("batch", {"build", "export"}),
    ],
)
def test_a_shared_option_is_the_same_in_every_command(name, commands):
    options = []
    for command in commands:
        parameters = {parameter.name: parameter for parameter in import_module(COMMANDS[command]).main.params}
        assert name in parameters, f"mge-{command} has no {name}"
        options.append(parameters[name].to_info_dict())
    assert all(option == options[0] for option in options)


def test_every_command_prints_through_the_helper_that_notices_a_full_disk():
    root = Path(__file__).parents[1]
    calls = [
        (path, call.lineno)
        for folder in ("mge", "export", "calibration", "runtime")
        for path in sorted((root / folder).rglob("*.py"))
        if "click.echo" in path.read_text()
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "click.echo"
        if not any(keyword.arg == "err" for keyword in call.keywords)
    ]
    assert [path.name for path, _ in calls] == ["files.py"], calls
