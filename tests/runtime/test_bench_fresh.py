"""Fresh processes that `mge-bench` starts."""

import sys
from pathlib import Path

import numpy as np
import pytest

from mge_runtime.bench import fresh
from mge_runtime.cache import cache_folder
from mge_runtime.errors import BackendError, OutputError
from mge_runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def trunked(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("trunked") / "mge.plan"
    tiny.write_trunked_bundle(path)
    return path


def test_a_fresh_process_that_fails_says_why(trunked, tmp_path):
    (tmp_path / "mge.plan").write_bytes(trunked.read_bytes()[:-100])
    with pytest.raises(BackendError, match=r"a fresh process did not answer: error: .*cut short"):
        fresh._start(
            [sys.executable, "-m", "mge_runtime.bench.child", str(tmp_path / "mge.plan"), "f", "cpu", "auto", "1"]
        )


def test_first_starts_hash_and_later_ones_do_not(trunked, monkeypatch):
    """What the children find in their caches before they start, as `bundle.untouched` left it there."""
    found = {"hashed": [], "before": []}
    start = fresh._start

    def watched(command, variables=None):
        if variables is None:
            return start(command)
        cache = Path(variables["MGE_CACHE_DIR"])
        assert cache != cache_folder()
        before = dict(fresh._stamps(cache))
        took = start(command, variables)
        found["before"].append(len(before))
        found["hashed"].append(fresh._stamps(cache) != before)
        return took

    monkeypatch.setattr(fresh, "_start", watched)
    with Pipeline.open(trunked, "cpu", threads=1) as pipeline:
        choice = pipeline.choice
    frame = np.zeros((32, 32, 3), np.uint8)
    measured = fresh.measure_fresh(trunked, choice, 1, frame, 0.0)
    assert len(measured.first) == len(measured.later) == len(measured.files) == 3
    assert found["before"][:2] == [0, 0], "one of each that does not count"
    assert sorted(found["before"][2:]) == [0, 0, 0, 1, 1, 1]
    assert [not before for before in found["before"]] == found["hashed"]


def test_a_temporary_folder_that_cannot_be_used_is_one_line(trunked, monkeypatch, tmp_path):
    with Pipeline.open(trunked, "cpu", threads=1) as pipeline:
        choice = pipeline.choice
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(OutputError, match=r"^cannot use the temporary folder: No such file.*set TMPDIR") as error:
        fresh.measure_fresh(trunked, choice, 1, np.zeros((32, 32, 3), np.uint8), 0.0)
    assert "\n" not in str(error.value)


def test_a_cache_of_its_own_has_the_users_engines_and_nothing_that_was_hashed(tmp_path, monkeypatch):
    theirs, own = tmp_path / "theirs", tmp_path / "own"
    monkeypatch.setenv("MGE_CACHE_DIR", str(theirs))
    for folder in ("hashed", "engines"):
        (theirs / folder).mkdir(parents=True)
        (theirs / folder / "file").touch()
    assert [kept.name for kept in fresh._cache(own, engines=True).iterdir()] == ["engines"]
    assert (own / "engines" / "file").is_file()
    assert list(fresh._cache(tmp_path / "plain", engines=False).iterdir()) == []
    assert fresh._stamps(theirs).keys() == {"file"}
    assert fresh._stamps(own) == {}
