"""Commands as a user calls them."""

import subprocess
import sys

from click.testing import CliRunner


def succeeds(command, *arguments):
    """Run a command to its end; its result."""
    found = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output
    return found


def fails(command, *arguments, code=1):
    """The last line that a command prints when it refuses something; errors of use have code 2."""
    found = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert isinstance(found.exception, SystemExit), found.exception
    assert found.exit_code == code, found.output
    lines = [line for line in found.stderr.splitlines() if line.lower().startswith("error: ")]
    assert len(lines) == 1, found.stderr
    return found.stderr.splitlines()[-1]


def run_without(modules, command, *arguments):
    """Run a command in a process where these modules are not installed."""
    program = f"import sys; sys.modules.update(dict.fromkeys({modules!r})); from {command} import main; main()"
    words = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=200)
