"""`mge-build`, as a user types it."""

import os
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mge_runtime.bundle import Bundle
from mge_runtime.cli.build import main
from mge_runtime.machine import describe_machine
from mge_runtime.trt.engines import bundle_engines
from mge_runtime.trt.target import Target
from tests.helpers.bundles import TARGET, add_engines, change_byte, write_changed

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")

AHEAD = ("--target", "rtx:sm86", "--into-bundle")


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(*arguments):
    """What goes to stderr where nothing was built."""
    result = run(*arguments)
    assert result.exit_code == 1
    return result.stderr


def test_engines_go_into_the_bundle_beside_those_of_other_targets(copy):
    first = run(copy, *AHEAD, "--batch", "1,2,4")
    assert first.exit_code == 0, first.stderr
    assert "experimental: not yet run" in first.stderr
    second = run(copy, "--target", "rtx:sm120,sm89", *AHEAD, "--opt-level", 0)
    assert second.exit_code == 0, second.stderr
    with Bundle.open(copy) as bundle:
        bundle.verify()
        targets = {Target.parse(name).capabilities: name for name in bundle.targets}
        assert set(targets) == {("sm86",), ("sm89", "sm120")}
        engines = bundle_engines(bundle, targets["sm86",])
        assert engines.details.batch.sizes == (1, 1, 8)  # built again, with the default
        assert engines.details.options["optimization_level"] == 0
        assert engines.plan("expert_1")[4:8] != b""
        assert {facts["attested"] for facts in engines.details.precision.values()} == {"network"}
    assert second.output.count(": in ") == 2
    assert second.stderr.count("replaces the engines for tensorrt-rtx-") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "rtx:sm86"], "engines that are built ahead of time are for other machines"),
        (["--target", "rtx:sm87", "--into-bundle"], "sm87 (Jetson Orin) has no TensorRT-RTX: run mge-build on that"),
        (["--target", "rtx:sm42", "--into-bundle"], "'sm42' is no compute capability of TensorRT-RTX: sm75, sm80"),
        (["--target", "rtx:", "--into-bundle"], "the target is 'rtx:'; expected native, or rtx:sm86,sm89,sm120"),
        (["--target", "cuda", "--into-bundle"], "the target is 'cuda'; expected native"),
        (["--batch", "8,1,1"], "the batch range is 8,1,1; expected MIN <= OPT <= MAX"),
        ([*AHEAD, "--backend", "tensorrt"], "ahead of time by tensorrt-rtx alone"),
        (["--device", "cpu"], "the device is 'cpu'; engines are built for a GPU: expected cuda:0"),
    ],
)
def test_what_cannot_be_built_is_one_line_and_changes_nothing(copy, arguments, message):
    before = copy.read_bytes()
    stderr = refused(copy, *arguments)
    assert message in stderr
    assert stderr.count("\n") == 1
    assert copy.read_bytes() == before


@pytest.mark.skipif(bool(describe_machine().gpus), reason="there is a GPU here; with one the gpu tests build here")
def test_without_a_gpu_native_says_why_and_what_to_do(copy):
    stderr = refused(copy)
    assert "there is no GPU cuda:0 here to build for (" in stderr
    assert "--target rtx:sm86 --into-bundle" in stderr


PROGRAM = "from mge_runtime.cli.build import main\nmain()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_build_that_is_stopped_leaves_the_bundle_and_says_so_where_it_can(copy, tmp_path, number):
    before, work, lines = copy.read_bytes(), tmp_path / "work", []
    work.mkdir()
    # Several targets, one after the other, so that a signal finds it busy.
    targets = [part for sm in ("sm80", "sm86", "sm89", "sm120", "sm121") for part in ("--target", f"rtx:{sm}")]
    command = [sys.executable, "-c", PROGRAM, copy, "--into-bundle", *targets]
    environment = {**os.environ, "TMPDIR": str(work)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:
            lines.append(line)
            if line.startswith("expert_1: "):
                process.send_signal(number)
        assert process.wait(60) == (-number if number == signal.SIGKILL else 1), lines
    assert copy.read_bytes() == before
    if number != signal.SIGKILL:
        assert lines[-1] == f"error: the build was interrupted ({number.name}): {copy} is as it was; run it again\n"
        assert not any("Traceback" in line for line in lines)
        assert not list(work.iterdir())
        assert {p.name for p in tmp_path.iterdir()} == {"work", "mge.plan"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_is_heard_before_the_library_builds(copy, number):
    """Reading and hashing a large bundle takes a while, too."""
    code = (
        "import os, time\n"
        "from mge_runtime.bundle import Bundle\n"
        "def verify(*_):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(60)\n"
        f"Bundle.verify = verify\n{PROGRAM}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, copy, *AHEAD], capture_output=True, text=True, timeout=50, check=False
    )
    line = f"error: the build was interrupted ({number.name}): {copy} is as it was; run it again"
    assert (done.returncode, done.stderr.splitlines()) == (1, [line])


@pytest.fixture
def nothing_is_built(monkeypatch):
    monkeypatch.setattr("mge_runtime.trt.build.build_engine", lambda *_, **__: pytest.fail("a graph was built"))


@pytest.mark.usefixtures("nothing_is_built")
def test_what_cannot_be_kept_is_found_out_before_anything_is_built(copy, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        assert f"cannot write {copy}: No space left on device; expected a writable folder" in refused(copy, *AHEAD)
    add_engines(copy)  # of another target: they would be copied
    change_byte(copy, f"engines/{TARGET}/expert_3.plan")
    assert "copy it again, or build these engines again" in refused(copy, *AHEAD)


@pytest.mark.usefixtures("nothing_is_built")
def test_turing_is_refused_before_the_other_targets_are_built(tiny, tmp_path):
    plan = {"type": "fp16", "operators": {"MatMul": {"float32": 1}}}
    write_changed(tiny, tmp_path / "mge.plan", precision={"expert_2": plan})
    stderr = refused(tmp_path / "mge.plan", *AHEAD, "--target", "rtx:sm75")
    assert "graph expert_2 cannot run on sm75: its MatMul are in FP32" in stderr


def test_a_temporary_folder_that_cannot_be_used_is_one_line(copy, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(copy.parent / "missing"))
    stderr = refused(copy, *AHEAD)
    assert "No such file or directory; expected a temporary folder with room: set TMPDIR" in stderr
