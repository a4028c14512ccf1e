"""A file appears whole or not at all, and only its own errors are called its own."""

import errno
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mge_runtime import files
from mge_runtime.errors import OutputError
from mge_runtime.files import atomic_path, check_writable, temporary_folder


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    return path


def write(path, text="new"):
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def unchanged(target):
    return target.read_text() == "old" and list(target.parent.iterdir()) == [target]


def test_errors_of_the_file_are_output_errors_and_those_from_elsewhere_pass(target):
    with pytest.raises(OutputError, match=r"cannot write .*table\.csv: No space left"), atomic_path(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError, match="Permission denied"), atomic_path(target) as temporary:
        raise PermissionError(errno.EACCES, "Permission denied", temporary)
    with pytest.raises(BrokenPipeError), atomic_path(target):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    with pytest.raises(FileNotFoundError, match=r"other\.txt"), atomic_path(target):
        (target.parent / "other.txt").read_text()
    assert unchanged(target)


def test_a_link_is_followed_and_stays(target, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    links = {"latest.csv": target, "relative.csv": "table.csv", "next.csv": tmp_path / "elsewhere" / "new.csv"}
    for name, leads_to in links.items():
        (tmp_path / name).symlink_to(leads_to)
        write(tmp_path / name, name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / leads_to).read_text() == name
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match=r"cannot write .*loop: Too many levels"):
        write(tmp_path / "loop")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*links, "elsewhere", "loop", "table.csv"])


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_a_replaced_file_keeps_its_permissions(target, mode):
    target.chmod(mode)
    write(target)
    assert (target.read_text(), stat.S_IMODE(target.stat().st_mode)) == ("new", mode)


def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "new.csv")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.csv").stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_replaced_file_keeps_its_owner(target):
    os.chown(target, 65534, 65534)
    write(target)
    assert (target.stat().st_uid, target.stat().st_gid) == (65534, 65534)


def test_a_pipe_gets_the_content_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    write(pipe, "new" * 100_000)  # more than a pipe holds
    reader.join(10)
    assert received == ["new" * 100_000]
    assert pipe.is_fifo()


def test_a_device_is_written_to_and_stays(tmp_path):
    null, full = tmp_path / "null", tmp_path / "full"
    try:
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(full, stat.S_IFCHR | 0o666, os.makedev(1, 7))
        null.write_bytes(b"")
    except OSError:
        pytest.skip("no device can be made here")
    write(null)
    with pytest.raises(OutputError, match=r"cannot write .*full: No space left on device"):
        write(full)
    assert null.is_char_device()
    assert full.is_char_device()


def test_what_a_descriptor_stands_for_is_appended_to(target):
    with target.open("ab") as log:
        write(f"/proc/self/fd/{log.fileno()}")
    assert target.read_text() == "oldnew"


def test_folders_and_sockets_are_refused(tmp_path):
    with pytest.raises(OutputError, match="it is a folder; expected a file name"):
        write(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(OutputError, match="it is a disk or a socket"):
            write(tmp_path / "socket")
        assert (tmp_path / "socket").is_socket()


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, os.fsdecode(b"\xff.csv")])
def test_every_name_that_a_file_may_have(tmp_path, name):
    try:
        (tmp_path / name).touch()
    except OSError:
        pytest.skip("this file system has no such names")
    write(tmp_path / name)
    assert (tmp_path / name).read_text() == "new"


def test_a_file_too_large_for_its_limit_is_one_error_and_leaves_the_old_one(target):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputError, match="File too large; the old file, if any, is unchanged"):
            write(target, "n" * 5000)
        with pytest.raises(OutputError, match="File too large"):
            check_writable(target)
        with pytest.raises(OutputError, match="set TMPDIR to another"), temporary_folder("test") as folder:
            (folder / "large").write_bytes(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert unchanged(target)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for 100 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_old_file(small_disk, monkeypatch):
    table = small_disk / "table.csv"
    table.write_text("old")
    with pytest.raises(OutputError, match="No space left on device; the old file, if any, is unchanged"):
        write(table, "n" * 200_000)
    (small_disk / "filler").write_bytes(bytes(96 << 10))
    with pytest.raises(OutputError, match=r"cannot write .*: No space left on device; expected a writable folder"):
        check_writable(table)
    assert table.read_text() == "old"
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with (
        pytest.raises(OutputError, match=r"disk: No space left on device; .* set TMPDIR"),
        temporary_folder("test") as f,
    ):
        (f / "large").write_bytes(bytes(5000))
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "table.csv"]


WRITER = """
import signal, sys, tempfile
from mge_runtime.files import atomic_path, temporary_folder
tempfile.tempdir = sys.argv[1]
with atomic_path(sys.argv[1] + "/table.csv") as part, temporary_folder("test") as folder:
    part.write_text("half"), (folder / "large").write_text("half")
    print(flush=True)
    signal.pause()
"""


def test_what_dead_processes_left_goes_and_what_living_ones_write_stays(tmp_path):
    def start():
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        return process

    def left():
        return {path.name for path in tmp_path.iterdir()} - {"table.csv"}

    with start() as alive:
        living = left()
        assert len(living) == 3  # a file; a folder, and the file that says whose it is
        with start() as dead:
            assert len(left()) == 6
            dead.kill()
        (tmp_path / ".table.csv.0a1b2c3d.part").write_text("of another program")
        write(tmp_path / "table.csv")
        assert left() == {*living, ".table.csv.0a1b2c3d.part"}
        assert (tmp_path / "table.csv").read_text() == "new"
        assert alive.poll() is None
        alive.kill()


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    def work(text):
        for _ in range(50):
            files._sweep.cache_clear()  # as other processes would
            write(tmp_path / "table.csv", text)

    texts = [str(number) * 1000 for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, texts)) == [None] * 4
    assert (tmp_path / "table.csv").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
