"""Weights that were hashed once are not hashed again while nobody touched the file."""

import os

import pytest

from mge_runtime.bundle import Bundle, untouched
from mge_runtime.errors import BundleError


@pytest.fixture
def settled(copy, tmp_path, monkeypatch):
    """A bundle that was written a while ago, opened and hashed once."""
    monkeypatch.setenv("MGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(untouched, "_SETTLED", 0.0)
    check_weights(copy)
    return copy


def check_weights(path, again=False):
    with Bundle.open(path) as bundle, bundle.verifying(["onnx/gate.weights"], again=again):
        pass


def refuse(*_):
    raise AssertionError("it was hashed")


def test_what_was_hashed_is_not_hashed_at_the_next_start(settled, monkeypatch):
    monkeypatch.setattr(Bundle, "_verify", refuse)
    check_weights(settled)
    with pytest.raises(AssertionError, match="it was hashed"):
        check_weights(settled, again=True)
    with Bundle.open(settled) as bundle, pytest.raises(AssertionError), bundle.verifying(["onnx/expert_1.weights"]):
        pass  # other entries were not


def test_a_file_that_was_touched_is_hashed_anew(settled, monkeypatch):
    before = settled.stat()
    with settled.open("r+b") as stream:
        first = stream.read(1)
        stream.seek(0)
        stream.write(first)
    os.utime(settled, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had been written
    monkeypatch.setattr(Bundle, "_verify", refuse)
    with pytest.raises(AssertionError, match="it was hashed"):
        check_weights(settled)


def test_bytes_that_rotted_are_found_without_a_hash(settled, monkeypatch):
    with Bundle.open(settled) as bundle:
        offset = bundle.region("onnx/gate.weights").offset
    with settled.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\x7f")
    monkeypatch.setattr(Bundle, "_verify", refuse)
    monkeypatch.setattr(untouched.Untouched, "hashed_before", lambda _: True)  # a disk changes bytes, not times
    with pytest.raises(BundleError, match="do not match"):
        check_weights(settled)


def test_a_file_written_just_now_is_not_remembered(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("MGE_CACHE_DIR", str(tmp_path / "cache"))
    check_weights(copy)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_no_error(copy, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("MGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(untouched, "_SETTLED", 0.0)
    check_weights(copy)
    check_weights(copy)
