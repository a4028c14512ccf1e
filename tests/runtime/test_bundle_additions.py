"""Calibrations and engines are added to a bundle whole or not at all, and never to another model than theirs."""

import fcntl
import signal
import subprocess
import sys
import threading

import pytest

from mge_runtime.bundle import Bundle, GraphModel, add_calibration, add_card, add_engine, write_bundle, writer
from mge_runtime.bundle.archive import ArchiveWriter, graph_entry, weights_entry
from mge_runtime.cli.info import main as info
from mge_runtime.errors import BundleError, OutputError
from mge_runtime.fields import LARGEST
from mge_runtime.files import lock
from tests.helpers.bundles import TARGET, add_engines, change_byte, manifest_hash, read_entries, write_entries
from tests.helpers.commands import fails, succeeds

OTHER_TARGET = "tensorrt-rtx-1.7-sm86-linux-x86_64"


@pytest.fixture
def newer(tiny, tmp_path):
    """A newer export, beside the bundle that it is to replace."""
    path = tmp_path / "newer" / "new.plan"
    path.parent.mkdir()
    tiny.write_tiny_bundle(path, seed=1)
    return path


def test_engines_and_calibration_are_added_beside_an_unchanged_model(copy, bundle_path):
    digest = manifest_hash(copy)
    with Bundle.open(copy) as bundle:
        assert (bundle.calibration(), bundle.targets) == (None, ())
    add_calibration(copy, {"temperature": 1.5})
    add_engines(copy, plans={"expert_3": b"engine " * 2000, "expert_1": b"m"}, details={"fp16": True})
    add_engines(copy, OTHER_TARGET)
    add_engines(copy, plans={"expert_3": b"newer"}, details={"fp16": False})
    add_calibration(copy, {"temperature": 1.25})
    with Bundle.open(copy) as bundle:
        assert bundle.manifest_sha256 == digest
        assert bundle.calibration().values == {"temperature": 1.25}
        assert bundle.targets == (TARGET, OTHER_TARGET)
        engine = bundle.engine(TARGET)
        assert (engine.details, list(engine.plans)) == ({"fp16": False}, ["expert_3"])
        assert bundle.read(f"engines/{TARGET}/expert_3.plan") == b"newer"
        assert bundle.entry(f"engines/{TARGET}/expert_3.plan").offset % 4096 == 0
        bundle.verify()
        with pytest.raises(BundleError, match="no engine for cpu"):
            bundle.engine("cpu")
    assert read_entries(bundle_path).items() <= read_entries(copy).items()


def test_additions_of_another_manifest_are_refused(copy, newer):
    right, other = manifest_hash(copy), manifest_hash(newer)
    with pytest.raises(BundleError, match="by now: build them again"):
        add_engine(copy, TARGET, {"expert_3": b"g"}, {}, manifest_sha256=other)
    add_calibration(copy, {"temperature": 1.5})
    add_engines(copy)
    entries = read_entries(copy)
    for name in ("calibration.json", f"engines/{TARGET}/engine.json"):
        write_entries(copy, {**entries, name: entries[name].replace(right.encode(), other.encode())})
        with Bundle.open(copy) as bundle, pytest.raises(BundleError, match=r"mge\.plan: .* belongs to the manifest"):
            bundle.calibration() if name == "calibration.json" else bundle.engine(TARGET)


def test_unknown_graphs_and_odd_targets_are_refused(copy):
    with pytest.raises(BundleError, match="no such graph"):
        add_engines(copy, plans={"expert_9": b""})
    with pytest.raises(BundleError, match="target is called"):
        add_engines(copy, "../up")


def test_those_that_add_at_once_all_succeed(copy):
    targets = [f"tensorrt-10.{n}-sm87-linux-aarch64" for n in range(6)]
    threads = [threading.Thread(target=add_engines, args=(copy, target)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Bundle.open(copy) as bundle:
        assert bundle.targets == tuple(targets)
    assert [p.name for p in copy.parent.iterdir()] == ["mge.plan"]


def test_a_calibration_is_not_added_to_a_model_that_came_before_the_lock(copy, newer, monkeypatch):
    digest, contents = manifest_hash(copy), newer.read_bytes()

    def late(*arguments, **options):
        if newer.exists():  # somebody else's rewrite ends just before this one gets the lock
            newer.replace(copy)
        lock(*arguments, **options)

    monkeypatch.setattr(writer, "lock", late)
    with pytest.raises(BundleError, match=f"was replaced while it was calibrated: .*expected {digest[:12]}"):
        add_calibration(copy, {"temperature": 1.5}, manifest_sha256=digest)
    assert copy.read_bytes() == contents


@pytest.mark.parametrize("how", ["renamed", "overwritten"])
@pytest.mark.parametrize(
    "add", [lambda path: add_calibration(path, {"temperature": 1.5}), add_engines], ids=["calibration", "engines"]
)
def test_an_old_model_never_replaces_a_newer_one_that_came_while_it_was_copied(copy, newer, monkeypatch, how, add):
    finish, contents = ArchiveWriter.finish, newer.read_bytes()

    def late(archive):  # `mv` and `cp` ask nobody
        finish(archive)
        newer.replace(copy) if how == "renamed" else copy.write_bytes(contents)

    monkeypatch.setattr(ArchiveWriter, "finish", late)
    with pytest.raises(BundleError, match=r"was replaced or overwritten while .*; the new file stays"):
        add(copy)
    assert copy.read_bytes() == contents
    assert [path.name for path in copy.parent.iterdir() if path.is_file()] == ["mge.plan"]


def test_an_export_waits_for_an_addition_and_replaces_what_it_wrote(copy, tiny, monkeypatch, caplog):
    copying, exported, finish = threading.Event(), threading.Event(), ArchiveWriter.finish

    def slow(archive):
        finish(archive)
        if threading.current_thread() is adding:
            copying.set()
            # The export says that it waits; it can be ready only after this thread has renamed its file.
            while not caplog.records:
                assert not exported.wait(0.01), "the export did not wait"

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


def test_engines_are_added_to_a_bundle_that_is_not_published_yet(bundle, tmp_path):
    def check(unpublished):
        add_engines(unpublished)
        add_engines(unpublished, OTHER_TARGET)
        # It stays locked, so that nobody takes it for what a dead process left.
        with unpublished.open("rb") as file, pytest.raises(BlockingIOError):
            lock(file.fileno(), wait=False)

    models = {
        graph.name: GraphModel(bundle.read(graph_entry(graph.name)), bundle.read(weights_entry(graph.name)))
        for graph in bundle.manifest.graphs
    }
    write_bundle(tmp_path / "mge.plan", bundle.manifest, models, check=check)
    assert [path.name for path in tmp_path.iterdir()] == ["mge.plan"]
    with Bundle.open(tmp_path / "mge.plan") as opened:
        assert opened.targets == (TARGET, OTHER_TARGET)


# `mge-build --into-bundle` with engines that take no time to build.
BUILD = """
import sys
from pathlib import Path
from types import SimpleNamespace
from mge_runtime.cli.build import main
from mge_runtime.trt import build
from mge_runtime.trt.engines import EngineDetails
from mge_runtime.trt.target import BatchRange, Target

def build_engines(bundle, job, folder, **options):
    plan = Path(sys.argv[1]).with_name("gate.engine")
    plan.write_bytes(b"an engine")
    return build.NewEngines({"expert_3": plan}, EngineDetails("1.7", None, BatchRange(1, 1, 8), {}, {}, "mge"))

build.load_vendor = lambda name: SimpleNamespace(name=name, version="1.7", messages=SimpleNamespace())
build.ahead_of_time = lambda vendor, capabilities: [Target.parse("tensorrt-rtx-1.7-sm86-linux-x86_64")]
build.build_engines = build_engines
main([sys.argv[1], "--target", "rtx:sm86", "--into-bundle"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_build_that_waits_for_another_process_says_so_and_can_be_stopped(copy, number):
    path = copy.rename(copy.with_name("mge\x1b[2J.plan"))
    before = path.read_bytes()
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with subprocess.Popen([sys.executable, "-c", BUILD, path], stderr=subprocess.PIPE, text=True) as process:
            guard = threading.Timer(60, process.kill)  # one that says nothing would wait for ever
            guard.start()
            lines = []
            for line in process.stderr:
                lines.append(line)
                if line.startswith("waiting for another process that writes "):
                    process.send_signal(number)
            guard.cancel()
            assert process.wait(20) == 1
    assert all(line[:-1].isprintable() for line in lines)
    assert lines[-1].startswith("error: ")
    assert f"was interrupted ({number.name})" in lines[-1]
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*.mge-part"))


def test_a_bundle_stays_readable_while_it_is_replaced(copy):
    with Bundle.open(copy) as bundle:
        assert bundle.in_place()
        add_calibration(copy, {"temperature": 2.0})
        assert not bundle.in_place()
        bundle.verify()
        assert bundle.calibration() is None


def test_a_card_is_added_to_the_bundle_that_it_describes_and_to_no_other(copy):
    with Bundle.open(copy) as bundle:
        sha256 = bundle.sha256
    before = copy.read_bytes()
    with pytest.raises(BundleError, match="was changed while its card was written"):
        add_card(copy, "# Birds\n", sha256="0" * 64)
    with pytest.raises(OutputError, match="shorten its text"):
        add_card(copy, "#" * (LARGEST + 1), sha256=sha256)
    assert copy.read_bytes() == before
    add_card(copy, "# B\x1birds\n\tindented\n", sha256=sha256)
    with Bundle.open(copy) as bundle:
        assert (bundle.card(), bundle.sha256) == ("# B\x1birds\n\tindented\n", sha256)
    assert succeeds(info, copy, "--card").stdout == "# B?irds\n        indented\n"
    change_byte(copy, "card.md")
    assert "do not match their hash" in fails(info, copy)
