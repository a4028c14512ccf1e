"""Opening holds the weights by the CRC-32 that the manifest names: no SHA-256 of half a gigabyte at each start."""

import importlib.util
import json
import zipfile
import zlib
from pathlib import Path

import pytest

from mge_runtime import Pipeline
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BundleError
from mge_runtime.selfcheck import open_subject

spec = importlib.util.spec_from_file_location("mge_tests_zip_entries", Path(__file__).with_name("zip_entries.py"))
zip_entries = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zip_entries)

WEIGHTS = "onnx/expert_3.weights"


def rewrite(path, change):
    entries = zip_entries.read_entries(path)
    change(entries)
    zip_entries.write_entries(path, entries)


def flip(path, name):
    with Bundle.open(path) as bundle:
        offset = bundle.region(name).offset
    with path.open("r+b") as stream:
        stream.seek(offset)
        (value,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([value ^ 1]))


def forget_crc(entries):
    """Make the manifest one of a bundle from before it named them."""
    manifest = json.loads(entries["manifest.json"])
    for entry in manifest["entries"].values():
        del entry["crc32"]
    entries["manifest.json"] = json.dumps(manifest).encode()


def refuse(*_):
    raise AssertionError("it was hashed")


def check(path):
    with Bundle.open(path) as bundle, bundle.verifying([WEIGHTS], quick=True):
        pass


def test_what_the_manifest_names_is_that_of_the_archive(bundle_path):
    with Bundle.open(bundle_path) as bundle, zipfile.ZipFile(bundle_path) as archive:
        named = {name: entry.crc32 for name, entry in bundle.manifest.entries.items()}
        assert named == {name: f"{archive.getinfo(name).CRC:08x}" for name in named}
        assert WEIGHTS in named


def test_opening_does_not_hash_the_weights_and_finds_one_flipped_bit(copy, monkeypatch):
    verify = Bundle._verify

    def graphs_alone(self, entry, write=None):
        return refuse() if entry.name.endswith(".weights") else verify(self, entry, write)

    monkeypatch.setattr(Bundle, "_verify", graphs_alone)
    Pipeline.open(copy, "cpu").close()
    flip(copy, WEIGHTS)
    with pytest.raises(BundleError, match=r"onnx/expert_3\.weights do not match"):
        Pipeline.open(copy, "cpu")


def test_weights_of_another_model_are_refused_at_once(copy):
    def swap(entries):
        entries[WEIGHTS] = bytes(len(entries[WEIGHTS]))

    rewrite(copy, swap)
    with pytest.raises(BundleError, match=r"onnx/expert_3\.weights has [0-9a-f]{8} as CRC-32, manifest\.json says"):
        Bundle.open(copy)


def test_a_forged_crc_passes_opening_and_neither_verifying_nor_the_self_check(copy):
    def forge(entries):
        entries[WEIGHTS] = bytes(len(entries[WEIGHTS]))
        manifest = json.loads(entries["manifest.json"])
        manifest["entries"][WEIGHTS]["crc32"] = f"{zlib.crc32(entries[WEIGHTS]):08x}"
        entries["manifest.json"] = json.dumps(manifest).encode()

    rewrite(copy, forge)
    check(copy)
    with Bundle.open(copy) as bundle, pytest.raises(BundleError, match=r"onnx/expert_3\.weights do not match"):
        bundle.verify()
    with pytest.raises(BundleError, match=r"onnx/expert_3\.weights do not match"):
        open_subject(copy, "cpu")


def test_a_bundle_that_names_no_crc_is_hashed(copy, monkeypatch):
    rewrite(copy, forget_crc)
    check(copy)
    flip(copy, WEIGHTS)
    with pytest.raises(BundleError, match="do not match"):
        check(copy)
    monkeypatch.setattr(Bundle, "_verify", refuse)
    with pytest.raises(AssertionError, match="it was hashed"):
        check(copy)


def test_all_else_still_hashes(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(Bundle, "_verify", refuse)
    with Bundle.open(copy) as bundle:
        for use in (bundle.verify, lambda: bundle.read(WEIGHTS), lambda: bundle.extract(tmp_path / "out")):
            with pytest.raises(AssertionError, match="it was hashed"):
                use()
    check(copy)
