"""mge-train over two processes, and Ctrl-C as a terminal and as a scheduler send it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mge.checkpoint import read_training
from tests.helpers.tiny_models import save_noise

OPTIONS = ["--init", "none", "--batch-size", "4", "--epochs", "2000", "--accelerator", "cpu", "--devices", "2"]
MODEL = ["--arch", "plainnet_w16", "--image-size", "64", "--ema", "0.9"]


@pytest.fixture
def data(tmp_path):
    for split, count in (("train", 8), ("val", 1)):
        save_noise(tmp_path / "data" / split, {"a": count, "b": count})
    return tmp_path / "data"


def stopped_after_an_epoch(arguments, table, send):
    """Output of a run that is sent a signal once it has written its table."""
    before = table.stat().st_mtime_ns if table.exists() else 0
    run = subprocess.Popen(
        [sys.executable, "-m", "mge.cli.train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its processes are a group of their own, as in a terminal
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 100
        while not (table.exists() and table.stat().st_mtime_ns > before):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        send(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=100)  # both processes have closed their output: none is left behind
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    assert (run.returncode, out.count("stopped in epoch")) == (130, 1), out + err
    assert "Traceback" not in err
    return out


@pytest.mark.slow
def test_torchrun_trains_once_with_all_its_processes(data, tmp_path):
    last = tmp_path / "run/last.pt"
    arguments = ["--data", data, "--out", last.parent, *MODEL, *OPTIONS[:4], "--accelerator", "cpu", "--workers", "0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    command = [*torchrun, "-m", "mge.cli.train", *map(str, arguments), "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("16 training and 2 validation images") == 1
    training = read_training(last)
    assert (training["processes"], training["progress"]["epoch"]) == (2, 1)


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_at_one_step(data, tmp_path):
    last = tmp_path / "run/last.pt"
    table = tmp_path / "run/metrics.csv"
    out = stopped_after_an_epoch(
        ["--data", data, "--out", last.parent, *MODEL, *OPTIONS, "--workers", "0"], table, os.kill
    )  # the first process alone hears it
    assert out.count("16 training and 2 validation images") == 1
    half = read_training(last)["progress"]
    assert half["epoch"] >= 1
    stopped_after_an_epoch(["--data", data, "--resume", last, *OPTIONS, "--workers", "1"], table, os.killpg)
    whole = read_training(last)["progress"]
    assert whole["history"][: half["epoch"]] == half["history"]
    assert whole["epoch"] > half["epoch"]
