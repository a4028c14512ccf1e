"""What a signal does to an export, and to any block that can be interrupted."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from mge_runtime.errors import ExportError
from mge_runtime.interrupt import interruptible


def test_a_busy_export_that_is_interrupted_says_so_and_leaves_nothing(single, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "TMPDIR": str(work)}
    command = [sys.executable, "-m", "mge_export.cli", "--ckpt", single, "--verify-images", "100000"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("expert_1: "):  # its graph is written; now it is verified on many images
                process.send_signal(signal.SIGINT)
                break
        lines += process.stderr
        output = process.stdout.read()
        assert process.wait(60) == 1, lines
    end = f"nothing was written to {tmp_path / 'mge.plan'}; run it again\n"
    assert lines[-1] == f"error: the export was interrupted (SIGINT): {end}"
    assert not [line for line in lines if "Traceback" in line or "Aborted" in line]
    assert output == ""
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "work"}
    assert not [path.name for path in work.iterdir() if "mge-export" in path.name]


def interrupted(block):
    """What a block of the export that gets signals becomes: the message of its error, or None."""
    try:
        with interruptible("the export", "nothing happened", ExportError) as check:
            block(check)
    except ExportError as error:
        return str(error)
    return None


def becomes_another(_):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("a module that was being loaded") from None


def gets_lost(check):
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    check()


def comes_again_while_cleaning(_):
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("block", [becomes_another, gets_lost, comes_again_while_cleaning])
def test_whatever_happens_to_an_interrupt_on_its_way_it_is_said(block):
    assert interrupted(lambda check: check()) is None
    assert interrupted(block) == "the export was interrupted (SIGINT): nothing happened"


def test_other_errors_pass_ignored_signals_stay_ignored_and_handlers_come_back():
    def block(check):
        signal.raise_signal(signal.SIGHUP)
        check()
        raise ZeroDivisionError

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(ZeroDivisionError):
            interrupted(block)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
