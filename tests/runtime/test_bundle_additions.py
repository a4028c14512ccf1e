import importlib.util
import threading
from pathlib import Path

import pytest

from mge_runtime.bundle import Bundle, add_calibration, add_engine, writer
from mge_runtime.errors import BundleError

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
    add_engine(copy, TARGET, {"gate": b"engine " * 2000, "mixture": b"m"}, {"fp16": True}, manifest_sha256=digest)
    add_engine(copy, "tensorrt-rtx-1.7-sm86-linux-x86_64", {"gate": b"g"}, {}, manifest_sha256=digest)
    add_engine(copy, TARGET, {"gate": b"newer"}, {"fp16": False}, manifest_sha256=digest)
    add_calibration(copy, {"temperature": 1.25})
    with Bundle.open(copy) as bundle:
        assert bundle.manifest_sha256 == digest
        assert bundle.calibration().values == {"temperature": 1.25}
        assert bundle.targets == (TARGET, "tensorrt-rtx-1.7-sm86-linux-x86_64")
        engine = bundle.engine(TARGET)
        assert engine.details == {"fp16": False}
        assert list(engine.plans) == ["gate"]
        assert bundle.read(f"engines/{TARGET}/gate.plan") == b"newer"
        assert bundle.region(f"engines/{TARGET}/gate.plan").offset % 4096 == 0
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
        add_engine(copy, TARGET, {"gate": b"g"}, {}, manifest_sha256=digest)
    with Bundle.open(copy) as bundle:
        right = bundle.manifest_sha256
    add_calibration(copy, {"temperature": 1.5})
    add_engine(copy, TARGET, {"gate": b"g"}, {}, manifest_sha256=right)
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


def test_unknown_stages_and_odd_targets_are_refused(copy):
    with Bundle.open(copy) as bundle:
        digest = bundle.manifest_sha256
    with pytest.raises(BundleError, match="no such stage"):
        add_engine(copy, TARGET, {"expert_9": b""}, {}, manifest_sha256=digest)
    with pytest.raises(BundleError, match="target is called"):
        add_engine(copy, "../up", {"gate": b""}, {}, manifest_sha256=digest)


def test_two_that_add_at_once_both_succeed(copy):
    with Bundle.open(copy) as bundle:
        digest = bundle.manifest_sha256
    targets = [f"tensorrt-10.{n}-sm87-linux-aarch64" for n in range(6)]
    threads = [
        threading.Thread(target=add_engine, args=(copy, t, {"gate": b"g"}, {}), kwargs={"manifest_sha256": digest})
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


def test_a_calibration_waits_for_whoever_rewrites_the_bundle_and_looks_then(copy, tiny, monkeypatch):
    """Between looking at a bundle and replacing it nobody else gets a turn: the hash is asked for under the lock."""
    with Bundle.open(copy) as bundle:
        digest = bundle.manifest_sha256
    replaced = []

    def late(descriptor):
        if not replaced:  # somebody else's rewrite ends just before this one gets the lock
            replaced.append(tiny.write_tiny_bundle(copy, seed=1))
        lock(descriptor)

    lock = writer.lock
    monkeypatch.setattr(writer, "lock", late)
    with pytest.raises(BundleError, match="was replaced while it was calibrated"):
        add_calibration(copy, {"temperature": 1.5}, manifest_sha256=digest)
    with Bundle.open(copy) as bundle:
        assert bundle.calibration() is None


def test_a_bundle_stays_readable_while_it_is_replaced(copy):
    with Bundle.open(copy) as bundle:
        assert bundle.in_place()
        add_calibration(copy, {"temperature": 2.0})
        assert not bundle.in_place()
        bundle.verify()
        assert bundle.calibration() is None
