"""One hash over everything in a bundle that can change a prediction; and opening, which hashes less."""

import hashlib
import importlib.util
import json
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner

from mge_runtime import Pipeline
from mge_runtime.bundle import Bundle, add_calibration, add_engine, write_bundle
from mge_runtime.cli.info import main
from mge_runtime.errors import BundleError
from mge_runtime.selfcheck import open_subject

spec = importlib.util.spec_from_file_location("mge_tests_zip_entries", Path(__file__).with_name("zip_entries.py"))
zip_entries = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zip_entries)

WEIGHTS = "onnx/expert_3.weights"
TARGET = "tensorrt-10.3-sm87-linux-aarch64"


def hash_of(path):
    with Bundle.open(path) as bundle:
        return bundle.sha256


def info(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def full(copy):
    """With engines and a calibration."""
    with Bundle.open(copy) as bundle:
        digest, graphs = bundle.manifest_sha256, [graph.name for graph in bundle.manifest.graphs]
    add_engine(copy, TARGET, dict.fromkeys(graphs, b"an engine"), {}, manifest_sha256=digest)
    add_calibration(copy, {"temperatures": {}})
    return copy


def test_it_is_what_sha256sum_says(full):
    entries = zip_entries.read_entries(full)
    documents = ["calibration.json", f"engines/{TARGET}/engine.json", "manifest.json"]
    lines = "".join(f"{hashlib.sha256(entries[name]).hexdigest()}  {name}\n" for name in documents)
    assert hash_of(full) == hashlib.sha256(lines.encode()).hexdigest()


def test_it_does_not_depend_on_the_order_in_which_things_were_added(full, tmp_path):
    entries = zip_entries.read_entries(full)
    zip_entries.write_entries(tmp_path / "turned.plan", dict(reversed(entries.items())))
    assert hash_of(tmp_path / "turned.plan") == hash_of(full)


def test_a_strangers_engines_and_calibration_change_it(full, bundle_path):
    told = hash_of(full)
    with Bundle.open(full) as bundle:
        bundle.verify(expected=told.upper())
        digest, graphs = bundle.manifest_sha256, [graph.name for graph in bundle.manifest.graphs]
    changes = (
        lambda: add_calibration(full, {"temperatures": {"logits": 0.01}}),
        lambda: add_engine(full, TARGET, dict.fromkeys(graphs, b"another!!"), {}, manifest_sha256=digest),
        lambda: add_engine(full, "tensorrt-11.4-sm90-linux-x86_64", {}, {}, manifest_sha256=digest),
    )
    seen = {told, hash_of(bundle_path)}
    for change in changes:
        change()
        with Bundle.open(full) as bundle:
            assert bundle.manifest_sha256 == digest
            bundle.verify()
            with pytest.raises(BundleError, match=rf"has the hash {bundle.sha256}; expected {told}"):
                bundle.verify(expected=told)
            seen.add(bundle.sha256)
    assert len(seen) == 2 + len(changes)


def test_the_bytes_behind_the_hash_are_checked_with_it(full, tmp_path):
    entries = zip_entries.read_entries(full)
    for name in ("onnx/expert_3.weights", f"engines/{TARGET}/expert_3.plan"):
        forged = tmp_path / "forged.plan"
        zip_entries.write_entries(forged, {**entries, name: bytes(len(entries[name]))})
        with pytest.raises(BundleError, match=name), Bundle.open(forged) as bundle:
            bundle.verify(expected=hash_of(full))
    zip_entries.write_entries(tmp_path / "more.plan", {**entries, f"engines/{TARGET}/more.plan": b"unlisted"})
    with Bundle.open(tmp_path / "more.plan") as bundle, pytest.raises(BundleError, match=r"does not list"):
        bundle.verify(expected=hash_of(full))


def test_mge_info_prints_it_and_holds_a_bundle_to_it(full):
    told = hash_of(full)
    assert told in info(full).output
    for arguments in ((full, "--verify", told), (full, f"--verify={told}"), (full, "--verify"), ("--verify", full)):
        result = info(*arguments)
        assert result.exit_code == 0
        assert "every entry matches its hash" in result.output
    add_calibration(full, {"temperatures": {"logits": 2.0}})
    result = info(full, "--verify", told)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert f"expected {told}" in result.output
    assert info(full, "--verify").exit_code == 0
    result = info(full, "--verify", told[:12])
    assert result.exit_code == 2
    assert "64 hexadecimal digits" in result.output


def test_the_chain_in_one_graph_counts_and_follows_the_calibration(tiny, tmp_path):
    graphs, path = tiny.make_graphs(), tmp_path / "mge.plan"
    models = {graph.spec.name: graph.model() for graph in graphs}
    hashes = []
    for chain in (None, b"one", b"another"):
        write_bundle(path, tiny.make_manifest(graphs), models, chain=chain)
        hashes.append(hash_of(path))
    assert len(set(hashes)) == 3
    add_calibration(path, {"temperatures": {}}, chain=lambda data: data + b" with a temperature")
    with Bundle.open(path) as bundle:
        assert bundle.read("onnx/chain.onnx") == b"another with a temperature"
        bundle.verify()
        assert "onnx/chain.onnx" not in bundle.manifest.entries


# Opening checks the weights by the CRC-32 that the manifest names: no SHA-256 of half a gigabyte at each start.


def rewrite(path, change):
    entries = zip_entries.read_entries(path)
    change(entries)
    zip_entries.write_entries(path, entries)


@pytest.fixture
def hashed(monkeypatch):
    """Names of the entries that were checked by SHA-256."""
    names, chunks = [], Bundle.chunks

    def recorded(self, name, *, quick=False):
        if not quick:
            names.append(name)
        return chunks(self, name, quick=quick)

    monkeypatch.setattr(Bundle, "chunks", recorded)
    return names


def test_opening_does_not_hash_the_weights_and_finds_one_flipped_bit(copy, hashed):
    Pipeline.open(copy, "cpu").close()
    assert hashed == [f"onnx/expert_{number}.onnx" for number in (1, 2, 3)]
    with Bundle.open(copy) as bundle:
        offset = bundle.entry(WEIGHTS).offset
    with copy.open("r+b") as stream:
        stream.seek(offset)
        stream.write(bytes([copy.read_bytes()[offset] ^ 1]))
    with pytest.raises(BundleError, match=r"onnx/expert_3\.weights do not match"):
        Pipeline.open(copy, "cpu")


def test_weights_of_another_model_are_refused_at_once(copy):
    def swap(entries):
        entries[WEIGHTS] = bytes(len(entries[WEIGHTS]))

    rewrite(copy, swap)
    with pytest.raises(BundleError, match=r"onnx/expert_3\.weights has 500 bytes with .*, manifest\.json says 500 and"):
        Bundle.open(copy)


def test_a_forged_crc_passes_opening_and_neither_verifying_nor_the_self_check(copy):
    def forge(entries):
        entries[WEIGHTS] = bytes(len(entries[WEIGHTS]))
        manifest = json.loads(entries["manifest.json"])
        manifest["entries"][WEIGHTS]["crc32"] = f"{zlib.crc32(entries[WEIGHTS]):08x}"
        entries["manifest.json"] = json.dumps(manifest).encode()

    rewrite(copy, forge)
    with Bundle.open(copy) as bundle, bundle.verifying([WEIGHTS]):
        pass
    with Bundle.open(copy) as bundle, pytest.raises(BundleError, match=r"onnx/expert_3\.weights do not match"):
        bundle.verify()
    with pytest.raises(BundleError, match=r"onnx/expert_3\.weights do not match"):
        open_subject(copy, "cpu")


def test_all_else_still_hashes(copy, tmp_path, hashed):
    with Bundle.open(copy) as bundle:
        for use in (bundle.verify, lambda: bundle.read(WEIGHTS), lambda: bundle.extract(tmp_path / "out")):
            hashed.clear()
            use()
            assert WEIGHTS in hashed
