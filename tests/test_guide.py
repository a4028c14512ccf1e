"""The code blocks of README and of the guide: what is cheap runs, and every command line has options that there are.

A block that can't run here has a comment before its fence, `<!-- not run: REASON -->`.
"""

import importlib
import re
import shlex
from contextlib import chdir
from pathlib import Path

import click
import pytest
import tomllib
from PIL import Image

from mge_runtime.bundle import add_calibration
from tests.helpers.commands import succeeds
from tests.helpers.images import NOISE, write_clip
from tests.runtime.tiny_chain import write_tiny_bundle

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs/guide").glob("*.md")),
    *sorted((ROOT / "docs/reference").glob("*.md")),
]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n+)?^```(?P<kind>sh|python)\n(?P<code>.*?)^```$", re.M | re.S)
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# Commands of a second or two; others are only parsed. And what a line names that is not here.
CHEAP, ELSEWHERE = ("mge-run", "mge-info"), ("runs/", "hf://", "rtsp://", "http://", "--video 0", "--as-machine", "DIR")


def blocks(kind):
    """Each block of a kind as a parameter: its code, and why it does not run."""
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in BLOCK.finditer(text):
            if found["kind"] == kind:
                line = text.count("\n", 0, found.start("code")) + 1
                yield pytest.param(found["code"], found["reason"], id=f"{page.relative_to(ROOT)}:{line}")


def command_lines():
    """Each call of one of our commands in a shell block, as words."""
    for block in blocks("sh"):
        code, reason = block.values
        for number, line in enumerate(code.replace("\\\n", " ").splitlines(), 1):
            for part in re.split(r" (?:&&|\||;|>) ", re.sub(r"(^|\s)#.*", "", line)):
                words = shlex.split(re.sub(r"^(sudo (-u \S+ )?)?(\w+=\S+ )*", "", part))
                if words and Path(words[0]).name in SCRIPTS:
                    call = [Path(words[0]).name, *words[1:]]
                    yield pytest.param(call, reason, id=f"{block.id}+{number}")


def command_of(name):
    """The function of click behind a command's name."""
    module, _, function = SCRIPTS[name].partition(":")
    return getattr(importlib.import_module(module), function)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with what the blocks name."""
    folder = tmp_path_factory.mktemp("guide")
    write_tiny_bundle(folder / "mge.plan")
    temperatures = {"mean_logits_1": 2.0, "mean_logits_2": 1.5, "logits": 0.8}
    exits = {"epsilon": 0.01, "delta": 0.05, "thresholds": {"mean_logits_1": 0.5, "mean_logits_2": None}}
    values = {"temperatures": temperatures, "exits": exits, "data": {}, "seed": 0, "made_by": "test", "report": {}}
    add_calibration(folder / "mge.plan", values)
    (folder / "models").symlink_to(ROOT / "models")
    (folder / "photos").mkdir()
    for name in ("bird.jpg", "tomatoes.jpg", "photos/a.png"):
        Image.fromarray(NOISE).save(folder / name)
    (folder / "list.txt").write_text("bird.jpg\n")
    write_clip(folder / "clip.mp4")
    return folder


@pytest.mark.parametrize(("code", "reason"), [*blocks("python")])
def test_a_block_of_python_runs(here, code, reason):
    program = compile(code, "block", "exec")
    if reason:
        pytest.skip(reason)
    with chdir(here):
        exec(program, {"__name__": "__main__"})


@pytest.mark.parametrize(("call", "reason"), [*command_lines()])
def test_a_command_line_has_options_that_there_are(here, call, reason):
    name, *words = call
    command = command_of(name)
    context = command.make_context(name, [], resilient_parsing=True)
    values, rest, _ = command.make_parser(context).parse_args(list(words))
    if isinstance(command, click.Group) and rest:
        command = command.get_command(context, verb := rest.pop(0))
        assert command, f"{name} has no verb {verb}"
        context = command.make_context(verb, [], resilient_parsing=True)
        values, _, _ = command.make_parser(context).parse_args(rest)
    for option in command.params:
        if isinstance(option.type, (click.Choice, click.IntRange, click.FloatRange)) and values.get(option.name):
            option.type_cast_value(context, values[option.name])
    if name in CHEAP and not reason and not any(part in " ".join(words) for part in ELSEWHERE):
        with chdir(here):
            succeeds(command, *words)
