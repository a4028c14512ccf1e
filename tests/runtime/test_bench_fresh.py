"""Fresh processes that `mge-bench` starts."""

import signal
import sys
from contextlib import suppress

import numpy as np
import pytest

from mge_runtime.bench import fresh
from mge_runtime.bench.deadline import UNBOUNDED, Deadline, TimeUp
from mge_runtime.errors import BackendError, OutputError
from mge_runtime.pipeline import Pipeline


def test_a_fresh_process_that_fails_says_why(bundle_path, tmp_path):
    (tmp_path / "mge.plan").write_bytes(bundle_path.read_bytes()[:-100])
    with pytest.raises(BackendError, match=r"a fresh process did not answer: error: .*cut short"):
        fresh._start(
            [sys.executable, "-m", "mge_runtime.bench.child", str(tmp_path / "mge.plan"), "f", "cpu", "auto", "1"]
        )


def test_each_way_starts_once_in_a_round_after_one_that_does_not_count(bundle_path, monkeypatch):
    started = []
    start = fresh._start

    def watched(command):
        started.append("mge_runtime.bench.child" in command)
        return start(command)

    monkeypatch.setattr(fresh, "_start", watched)
    with Pipeline.open(bundle_path, "cpu", threads=1) as pipeline:
        choice = pipeline.choice
    monkeypatch.setattr(fresh, "_MOST_ROUNDS", 3)
    kept = []
    frame = np.zeros((32, 32, 3), np.uint8)
    fresh.measure_fresh(bundle_path, choice, 1, frame, UNBOUNDED, lambda _line: None, kept.append)
    (measured,) = kept
    assert len(measured.bundle) == len(measured.files) == 3
    assert started[:2] == [True, False]
    assert all(sorted(started[n : n + 2]) == [False, True] for n in (2, 4, 6))
    assert measured.ratio.rounds == tuple(
        one.seconds / other.seconds for one, other in zip(measured.bundle, measured.files, strict=True)
    )


def test_a_temporary_folder_that_cannot_be_used_is_one_line(bundle_path, monkeypatch, tmp_path):
    with Pipeline.open(bundle_path, "cpu", threads=1) as pipeline:
        choice = pipeline.choice
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(OutputError, match=r"^cannot write to .*: No such file.*set TMPDIR") as error:
        fresh.measure_fresh(bundle_path, choice, 1, np.zeros((32, 32, 3), np.uint8), UNBOUNDED, print, print)
    assert "\n" not in str(error.value)


def test_an_incomplete_round_does_not_count_and_no_process_is_left_behind(bundle_path, monkeypatch):
    with Pipeline.open(bundle_path, "cpu", threads=1) as pipeline:
        choice = pipeline.choice
    limits = iter([1e9] * 5)
    monkeypatch.setattr(Deadline, "left", property(lambda _: next(limits, 0.0)))
    monkeypatch.setattr(fresh, "_start", lambda _: fresh.Start(1.0, None))
    kept = []
    frame = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(TimeUp):
        fresh.measure_fresh(bundle_path, choice, 1, frame, Deadline.after(1e9), lambda _line: None, kept.append)
    assert [(len(found.bundle), len(found.files)) for found in kept] == [(1, 1)]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such timer")
def test_time_is_up_once_while_what_it_stopped_cleans_up_and_again_where_it_got_lost():
    cleaned = []

    def work():
        with suppress(TimeUp):  # as a destructor loses it
            signal.raise_signal(signal.SIGALRM)
        try:
            signal.raise_signal(signal.SIGALRM)
        finally:
            signal.raise_signal(signal.SIGALRM)
            try:
                raise ValueError
            except ValueError:
                signal.raise_signal(signal.SIGALRM)
            cleaned.append(True)

    with Deadline.after(60).enforced(), pytest.raises(TimeUp):
        work()
    assert cleaned
