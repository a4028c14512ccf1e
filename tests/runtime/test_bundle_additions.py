import importlib.util
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from mge_runtime.bundle import Bundle, GraphModel, add_calibration, add_engine, write_bundle, writer
from mge_runtime.bundle.archive import ArchiveWriter, graph_entry, weights_entry
from mge_runtime.errors import BuildError, BundleError
from mge_runtime.files import lock
from mge_runtime.trt import build
from mge_runtime.trt.engines import EngineDetails
from mge_runtime.trt.target import BatchRange, Target, TargetRequest

spec = importlib.util.spec_from_file_location("mge_tests_zip_entries", Path(__file__).with_name("zip_entries.py"))
zip_entries = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zip_entries)

TARGET = "tensorrt-10.3-sm87-linux-aarch64"


def test_engines_and_calibration_are_added_beside_an_unchanged_model(copy, bundle_path):
    with Bundle.open(copy) as bundle:
        digest = bundle.manifest_sha256
        assert bundle.calibration() is None
        assert bundle.targets == ()
    add_calibration(copy, {"temperature": 1.5})
    add_engine(copy, TARGET, {"expert_3": b"engine " * 2000, "expert_1": b"m"}, {"fp16": True}, manifest_sha256=digest)
    add_engine(copy, "tensorrt-rtx-1.7-sm86-linux-x86_64", {"expert_3": b"g"}, {}, manifest_sha256=digest)
    add_engine(copy, TARGET, {"expert_3": b"newer"}, {"fp16": False}, manifest_sha256=digest)
    add_calibration(copy, {"temperature": 1.25})
    with Bundle.open(copy) as bundle:
        assert bundle.manifest_sha256 == digest
        assert bundle.calibration().values == {"temperature": 1.25}
        assert bundle.targets == (TARGET, "tensorrt-rtx-1.7-sm86-linux-x86_64")
        engine = bundle.engine(TARGET)
        assert engine.details == {"fp16": False}
        assert list(engine.plans) == ["expert_3"]
        assert bundle.read(f"engines/{TARGET}/expert_3.plan") == b"newer"
        assert bundle.entry(f"engines/{TARGET}/expert_3.plan").offset % 4096 == 0
        bundle.verify()
        with pytest.raises(BundleError, match="no engine for cpu"):
            bundle.engine("cpu")
    before, after = zip_entries.read_entries(bundle_path), zip_entries.read_entries(copy)
    assert {name: after[name] for name in before} == before


def test_additions_of_another_manifest_are_refused(copy, tiny, tmp_path):
    tiny.write_tiny_bundle(tmp_path / "other.plan", seed=1)
    with Bundle.open(tmp_path / "other.plan") as other:
        digest = other.manifest_sha256
    with pytest.raises(BundleError, match="by now: build them again"):
        add_engine(copy, TARGET, {"expert_3": b"g"}, {}, manifest_sha256=digest)
    with Bundle.open(copy) as bundle:
        right = bundle.manifest_sha256
    add_calibration(copy, {"temperature": 1.5})
    add_engine(copy, TARGET, {"expert_3": b"g"}, {}, manifest_sha256=right)
    contents = zip_entries.read_entries(copy)
    for name in ("calibration.json", f"engines/{TARGET}/engine.json"):
        zip_entries.write_entries(
            tmp_path / "mixed.plan", {**contents, name: contents[name].replace(right.encode(), digest.encode())}
        )
        with (
            Bundle.open(tmp_path / "mixed.plan") as bundle,
            pytest.raises(BundleError, match=r"mixed\.plan: .* belongs to the manifest"),
        ):
            bundle.calibration() if name == "calibration.json" else bundle.engine(TARGET)


def test_unknown_graphs_and_odd_targets_are_refused(copy):
    with Bundle.open(copy) as bundle:
        digest = bundle.manifest_sha256
    with pytest.raises(BundleError, match="no such graph"):
        add_engine(copy, TARGET, {"expert_9": b""}, {}, manifest_sha256=digest)
    with pytest.raises(BundleError, match="target is called"):
        add_engine(copy, "../up", {"expert_3": b""}, {}, manifest_sha256=digest)


def test_two_that_add_at_once_both_succeed(copy):
    with Bundle.open(copy) as bundle:
        digest = bundle.manifest_sha256
    targets = [f"tensorrt-10.{n}-sm87-linux-aarch64" for n in range(6)]
    threads = [
        threading.Thread(target=add_engine, args=(copy, t, {"expert_3": b"g"}, {}), kwargs={"manifest_sha256": digest})
        for t in targets
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Bundle.open(copy) as bundle:
        assert bundle.targets == tuple(targets)
    assert [p.name for p in copy.parent.iterdir()] == ["mge.plan"]


def test_a_calibration_is_not_added_to_a_model_that_it_was_not_measured_with(copy, tiny):
    with Bundle.open(copy) as bundle:
        digest = bundle.manifest_sha256
    tiny.write_tiny_bundle(copy, seed=1)
    before = copy.read_bytes()
    with pytest.raises(BundleError, match=f"was replaced while it was calibrated: .*expected {digest[:12]}"):
        add_calibration(copy, {"temperature": 1.5}, manifest_sha256=digest)
    assert copy.read_bytes() == before


@pytest.fixture
def newer(tiny, tmp_path):
    """A newer export, beside the bundle that it is to replace."""
    folder = tmp_path / "newer"
    folder.mkdir()
    tiny.write_tiny_bundle(folder / "new.plan", seed=1)
    return folder / "new.plan"


def test_a_calibration_waits_for_whoever_rewrites_the_bundle_and_looks_then(copy, newer, monkeypatch):
    """Between looking at a bundle and replacing it nobody else gets a turn: the hash is asked for under the lock."""
    with Bundle.open(copy) as bundle:
        digest = bundle.manifest_sha256

    def late(descriptor, waiting):
        if newer.exists():  # somebody else's rewrite ends just before this one gets the lock
            newer.replace(copy)
        lock(descriptor, waiting)

    lock = writer.lock
    monkeypatch.setattr(writer, "lock", late)
    with pytest.raises(BundleError, match="was replaced while it was calibrated"):
        add_calibration(copy, {"temperature": 1.5}, manifest_sha256=digest)
    with Bundle.open(copy) as bundle:
        assert bundle.calibration() is None


@pytest.mark.parametrize("how", ["renamed", "overwritten"])
def test_an_old_model_never_replaces_a_newer_one_that_came_while_it_was_copied(copy, newer, monkeypatch, how):
    with Bundle.open(copy) as bundle:
        digest = bundle.manifest_sha256
    contents = newer.read_bytes()

    def late(archive):  # `mv` and `cp` ask nobody
        finish(archive)
        newer.replace(copy) if how == "renamed" else copy.write_bytes(contents)

    finish = ArchiveWriter.finish
    monkeypatch.setattr(ArchiveWriter, "finish", late)
    additions = (
        lambda: add_calibration(copy, {"temperature": 1.5}),
        lambda: add_engine(copy, TARGET, {"expert_3": b"g"}, {}, manifest_sha256=digest),
    )
    original = copy.read_bytes()
    for add in additions:
        copy.write_bytes(original)
        newer.write_bytes(contents)
        with pytest.raises(BundleError, match=r"was replaced or overwritten while .*; the new file stays"):
            add()
        assert copy.read_bytes() == contents
        assert [path.name for path in copy.parent.iterdir() if path.is_file()] == ["mge.plan"]


def test_an_export_waits_for_an_addition_and_replaces_what_it_wrote(copy, tiny, monkeypatch, caplog):
    copying, exported = threading.Event(), threading.Event()

    def slow(archive):
        finish(archive)
        if threading.current_thread() is adding:
            copying.set()
            # The export says that it waits; it can be ready only after this thread has renamed its file.
            while not caplog.records:
                assert not exported.wait(0.01), "the export did not wait"

    finish = ArchiveWriter.finish
    monkeypatch.setattr(ArchiveWriter, "finish", slow)
    adding = threading.Thread(target=add_calibration, args=(copy, {"temperature": 1.5}))
    adding.start()
    assert copying.wait(30)
    written = tiny.write_tiny_bundle(copy, seed=1)
    exported.set()
    adding.join()
    assert [record.getMessage() for record in caplog.records] == [f"waiting for another process that writes {copy}"]
    with Bundle.open(copy) as bundle:
        assert bundle.manifest == written
        assert bundle.calibration() is None


def test_engines_are_added_to_a_bundle_that_is_not_published_yet(copy, tmp_path):
    def check(unpublished):
        for target in (TARGET, "tensorrt-rtx-1.7-sm86-linux-x86_64"):
            with Bundle.open(unpublished) as bundle:
                digest = bundle.manifest_sha256
            add_engine(unpublished, target, {"expert_3": b"g"}, {}, manifest_sha256=digest)
        # It stays locked, so that nobody takes it for what a dead process left.
        with unpublished.open("rb") as file, pytest.raises(BlockingIOError):
            lock(file.fileno(), None)

    with Bundle.open(copy) as bundle:
        models = {
            s.name: GraphModel(
                *(bundle.read(n) for n in (graph_entry(s.name), weights_entry(s.name)) if n in bundle.sizes)
            )
            for s in bundle.manifest.graphs
        }
        (tmp_path / "out").mkdir()
        write_bundle(tmp_path / "out" / "mge.plan", bundle.manifest, models, check=check)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mge.plan"]
    with Bundle.open(tmp_path / "out" / "mge.plan") as bundle:
        assert len(bundle.targets) == 2


# `mge-build --into-bundle` with engines that take no time to build.
BUILD = """
import sys
from pathlib import Path
from types import SimpleNamespace
from mge_runtime.cli.build import main
from mge_runtime.trt import build
from mge_runtime.trt.target import BatchRange
from mge_runtime.trt.engines import EngineDetails
from mge_runtime.trt.target import Target

def build_engines(bundle, vendor, target, folder, **options):
    plan = Path(sys.argv[1]).with_name("gate.engine")
    plan.write_bytes(b"an engine")
    return build.NewEngines(target, {"expert_3": plan}, EngineDetails("1.7", None, BatchRange(1, 1, 8), {}, {}, "mge"))

build.load_vendor = lambda name: SimpleNamespace(name=name, version="1.7", messages=SimpleNamespace())
build.ahead_of_time = lambda vendor, capabilities: [Target.parse("tensorrt-rtx-1.7-sm86-linux-x86_64")]
build.build_engines = build_engines
main([sys.argv[1], "--target", "rtx:sm86", "--into-bundle"])
"""
CALIBRATE = """
import sys
from mge_runtime.bundle import add_calibration
from mge_runtime.errors import MGEError
from mge_runtime.interrupt import interruptible
try:
    with interruptible("the calibration", "nothing changed", MGEError):
        add_calibration(sys.argv[1], {})
except MGEError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize("program", [BUILD, CALIBRATE], ids=["build", "calibrate"])
def test_whoever_waits_for_another_process_says_so_and_can_be_stopped(copy, program, number):
    import fcntl

    before = copy.read_bytes()
    with copy.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with subprocess.Popen([sys.executable, "-c", program, copy], stderr=subprocess.PIPE, text=True) as process:
            guard = threading.Timer(60, process.kill)  # one that says nothing would wait for ever
            guard.start()
            lines = []
            for line in process.stderr:
                lines.append(line)
                if line.startswith("waiting for another process that writes "):
                    process.send_signal(number)
            guard.cancel()
            assert process.wait(20) == 1
    assert lines[-1].startswith("error: ")
    assert f"was interrupted ({number.name})" in lines[-1]
    assert copy.read_bytes() == before
    assert not list(copy.parent.glob("*.part")) + list(copy.parent.glob(".*.part"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
def test_a_build_whose_progress_stops_it_while_it_waits_is_an_error_of_ours(copy, monkeypatch, caplog):
    import fcntl

    copy = copy.rename(copy.with_name("mge\x1b[2J.plan"))
    plan = copy.with_name("gate.engine")
    plan.write_bytes(b"an engine")
    details = EngineDetails("1.7", None, BatchRange(1, 1, 8), {}, {}, "mge")
    vendor = SimpleNamespace(name="tensorrt-rtx", version="1.7", messages=SimpleNamespace())
    monkeypatch.setattr(build, "load_vendor", lambda _: vendor)
    monkeypatch.setattr(build, "ahead_of_time", lambda *_: [Target.parse("tensorrt-rtx-1.7-sm86-linux-x86_64")])
    built = build.NewEngines(Target.parse("tensorrt-rtx-1.7-sm86-linux-x86_64"), {"expert_3": plan}, details)
    monkeypatch.setattr(build, "build_engines", lambda *_, **__: built)
    before = copy.read_bytes()
    requests = [TargetRequest.parse("rtx:sm86")]
    with copy.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match="stopped while waiting for another process"):
            build.build_targets(copy, requests, into_bundle=True, progress=lambda *_: False)
    assert [record.getMessage().isprintable() for record in caplog.records] == [True]
    assert copy.read_bytes() == before


def test_a_bundle_stays_readable_while_it_is_replaced(copy):
    with Bundle.open(copy) as bundle:
        assert bundle.in_place()
        add_calibration(copy, {"temperature": 2.0})
        assert not bundle.in_place()
        bundle.verify()
        assert bundle.calibration() is None
