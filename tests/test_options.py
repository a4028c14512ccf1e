"""What several commands take is one option: the same spelling, type, default and help wherever it is."""

from importlib import import_module

import pytest

COMMANDS = {
    "run": "mge_runtime.cli.run",
    "bench": "mge_runtime.cli.bench",
    "build": "mge_runtime.cli.build",
    "calibrate": "mge_calibration.cli",
    "eval": "mge.cli.evaluate",
    "train": "mge.cli.train",
    "export": "mge_export.cli",
}
RUNNING = {"run", "bench", "calibrate", "eval"}


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("device", RUNNING),
        ("backend", RUNNING),
        ("threads", RUNNING),
        ("no_mmap", RUNNING),
        ("max_pixels", RUNNING | {"train", "export"}),
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
