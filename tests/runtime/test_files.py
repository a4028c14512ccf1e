"""A file appears whole or not at all, and only its own errors are called its own."""

import errno

import pytest

from mge_runtime.errors import OutputError
from mge_runtime.files import atomic_path


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    return path


def test_errors_of_the_file_are_output_errors(target):
    with pytest.raises(OutputError, match=r"cannot write .*table\.csv: No space left"), atomic_path(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError, match="Permission denied"), atomic_path(target) as temporary:
        raise PermissionError(errno.EACCES, "Permission denied", temporary)
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_errors_from_elsewhere_pass(target):
    with pytest.raises(BrokenPipeError), atomic_path(target):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    with pytest.raises(FileNotFoundError, match=r"other\.txt"), atomic_path(target):
        (target.parent / "other.txt").read_text()
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]
