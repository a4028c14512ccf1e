"""`mge-build`, as a user types it."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner

from mge_runtime.bundle import Bundle, add_engine, write_bundle
from mge_runtime.cli.build import main
from mge_runtime.trt.engines import BundleEngines
from mge_runtime.trt.target import Target

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")


@pytest.fixture
def path(bundle_path, tmp_path):
    return shutil.copy(bundle_path, tmp_path / "mge.plan")


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_engines_go_into_the_bundle_beside_those_of_other_targets(path):
    first = run(path, "--target", "rtx:sm86", "--into-bundle", "--batch", "1,2,4")
    assert first.exit_code == 0, first.stderr
    assert "experimental: not yet run" in first.stderr
    second = run(path, "--target", "rtx:sm120,sm89", "--target", "rtx:sm86", "--into-bundle", "--opt-level", 0)
    assert second.exit_code == 0, second.stderr
    with Bundle.open(path) as bundle:
        bundle.verify()
        targets = {Target.parse(name).capabilities: name for name in bundle.targets}
        assert set(targets) == {("sm86",), ("sm89", "sm120")}
        engines = BundleEngines(bundle, targets["sm86",])
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
        (["--target", "rtx:sm86", "--into-bundle", "--backend", "tensorrt"], "ahead of time by tensorrt-rtx alone"),
        (["--device", "cpu"], "the device is 'cpu'; engines are built for a GPU: expected cuda:0"),
    ],
)
def test_what_cannot_be_built_is_one_line_and_changes_nothing(path, arguments, message):
    before = digest(path)
    result = run(path, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert digest(path) == before


def test_without_a_gpu_native_says_why_and_what_to_do(path):
    # The description of this machine decides; with a GPU the gpu tests build here.
    from mge_runtime.machine import describe_machine

    if describe_machine().gpus:
        pytest.skip("there is a GPU here")
    result = run(path)
    assert result.exit_code == 1
    assert "there is no GPU cuda:0 here to build for (" in result.stderr
    assert "--target rtx:sm86 --into-bundle" in result.stderr


# Builds for several targets one after the other, so that a signal finds it busy.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from mge_runtime.cli.build import main
main()
"""


def started(path, temporary):
    targets = [part for sm in ("sm80", "sm86", "sm89", "sm120", "sm121") for part in ("--target", f"rtx:{sm}")]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, path, "--into-bundle", *targets],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("expert_1: "):
            break
    assert lines[-1].startswith("expert_1: "), lines
    return process, lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_build_that_is_stopped_leaves_the_bundle_and_says_so_where_it_can(path, tmp_path, number):
    before, work = digest(path), tmp_path / "work"
    work.mkdir()
    process, lines = started(path, work)
    with process:
        process.send_signal(number)
        lines += process.stderr
        assert process.wait(60) == (-number if number == signal.SIGKILL else 1)
    assert digest(path) == before
    if number != signal.SIGKILL:
        assert lines[-1] == f"error: the build was interrupted ({number.name}): {path} is as it was; run it again\n"
        assert not [line for line in lines if "Traceback" in line]
        assert not list(work.iterdir())
        assert [p.name for p in tmp_path.iterdir() if p.name != "work"] == ["mge.plan"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_is_heard_before_the_library_builds(path, number):
    """Reading and hashing a large bundle takes a while, too."""
    code = "import os\nfrom mge_runtime.bundle import Bundle\n"
    code += "def verify(*_):\n    os.kill(os.getpid(), int(os.environ['NUMBER']))\n    __import__('time').sleep(60)\n"
    code += "Bundle.verify = verify\n" + PROGRAM
    command = [sys.executable, "-c", code, str(path), "--into-bundle", "--target", "rtx:sm86"]
    environment = {**os.environ, "NUMBER": str(int(number))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=50, check=False)
    line = f"error: the build was interrupted ({number.name}): {path} is as it was; run it again"
    assert (done.returncode, done.stderr.splitlines()) == (1, [line])


@pytest.fixture
def nothing_is_built(monkeypatch):
    monkeypatch.setattr("mge_runtime.trt.build.build_engine", lambda *_, **__: pytest.fail("a graph was built"))


@pytest.mark.usefixtures("nothing_is_built")
def test_what_cannot_be_kept_is_found_out_before_anything_is_built(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        result = run(path, "--target", "rtx:sm86", "--into-bundle")
        assert result.exit_code == 1
        assert f"cannot write {path}: No space left on device; expected a writable folder" in result.stderr
    # Another target's engines that are damaged would be copied.
    add_engine(path, "tensorrt-10.3-sm87-linux-aarch64", {"expert_3": b"engine"}, {}, manifest_sha256=manifest_of(path))
    data = bytearray(path.read_bytes())
    with Bundle.open(path) as bundle:
        data[bundle.entry("engines/tensorrt-10.3-sm87-linux-aarch64/expert_3.plan").offset] ^= 1
    path.write_bytes(data)
    result = run(path, "--target", "rtx:sm86", "--into-bundle")
    assert result.exit_code == 1
    assert "copy it again, or build these engines again" in result.stderr


@pytest.mark.usefixtures("nothing_is_built")
def test_turing_is_refused_before_the_other_targets_are_built(tiny, tmp_path):
    graphs = tiny.make_graphs()
    manifest = tiny.make_manifest(graphs)
    plan = {"type": "fp16", "operators": {"MatMul": {"float32": 1}}}
    manifest = replace(manifest, precision={**manifest.precision, "expert_2": plan})
    write_bundle(tmp_path / "mge.plan", manifest, {g.spec.name: g.model() for g in graphs})
    result = run(tmp_path / "mge.plan", "--target", "rtx:sm86", "--target", "rtx:sm75", "--into-bundle")
    assert result.exit_code == 1
    assert "graph expert_2 cannot run on sm75: its MatMul are in FP32" in result.stderr


def test_a_temporary_folder_that_cannot_be_used_is_one_line(path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(path.parent / "missing"))
    result = run(path, "--target", "rtx:sm86", "--into-bundle")
    assert result.exit_code == 1
    assert "No such file or directory; expected a temporary folder with room: set TMPDIR" in result.stderr


def full(*_, **__):
    raise OSError(28, "No space left on device")


def manifest_of(path):
    with Bundle.open(path) as bundle:
        return bundle.manifest_sha256
