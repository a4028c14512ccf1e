"""One hash over everything in a bundle that can change a prediction; and opening, which hashes less."""

import hashlib
import json
import zlib

import pytest
from click.testing import CliRunner

from mge_runtime import Pipeline
from mge_runtime.bench_subject import open_subject
from mge_runtime.bundle import Bundle, add_calibration, write_bundle
from mge_runtime.cli.info import main
from mge_runtime.errors import BundleError
from tests.helpers.bundles import TARGET, add_engines, manifest_hash, read_entries, write_entries

WEIGHTS = "onnx/expert_3.weights"


def hash_of(path):
    with Bundle.open(path) as bundle:
        return bundle.sha256


def info(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def full(copy):
    """With engines and a calibration."""
    add_engines(copy)
    add_calibration(copy, {"temperatures": {}})
    return copy


def test_it_is_what_sha256sum_says_whatever_the_order_of_the_entries(full, tmp_path):
    entries = read_entries(full)
    documents = ["calibration.json", f"engines/{TARGET}/engine.json", "manifest.json"]
    lines = "".join(f"{hashlib.sha256(entries[name]).hexdigest()}  {name}\n" for name in documents)
    write_entries(tmp_path / "turned.plan", dict(reversed(entries.items())))
    assert {hash_of(full), hash_of(tmp_path / "turned.plan")} == {hashlib.sha256(lines.encode()).hexdigest()}


def test_a_strangers_engines_and_calibration_change_it(full, bundle_path):
    told, digest = hash_of(full), manifest_hash(full)
    with Bundle.open(full) as bundle:
        bundle.verify(expected=told.upper())
    changes = (
        lambda: add_calibration(full, {"temperatures": {"logits": 0.01}}),
        lambda: add_engines(full, plans={"expert_3": b"another!!"}),
        lambda: add_engines(full, "tensorrt-11.4-sm90-linux-x86_64"),
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (WEIGHTS, WEIGHTS),
        (f"engines/{TARGET}/expert_3.plan", "expert_3.plan"),
        (f"engines/{TARGET}/more.plan", "does not list"),
    ],
)
def test_the_bytes_behind_the_hash_are_checked_with_it(full, tmp_path, name, message):
    entries = read_entries(full)
    write_entries(tmp_path / "forged.plan", {**entries, name: bytes(len(entries.get(name, "unlisted")))})
    with pytest.raises(BundleError, match=message), Bundle.open(tmp_path / "forged.plan") as bundle:
        bundle.verify(expected=hash_of(full))


def test_mge_info_prints_it_and_checks_a_bundle_against_it(full):
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
    result = info(full, "--verify", told[:12])
    assert result.exit_code == 2
    assert "64 hexadecimal digits" in result.output


def test_the_chain_in_one_graph_counts_and_follows_the_calibration(tiny, tmp_path):
    graphs, path, hashes = tiny.make_graphs(), tmp_path / "mge.plan", set()
    models = {graph.spec.name: graph.model() for graph in graphs}
    for chain in (None, b"one", b"another"):
        write_bundle(path, tiny.make_manifest(graphs), models, chain=chain)
        hashes.add(hash_of(path))
    assert len(hashes) == 3
    add_calibration(path, {"temperatures": {}}, chain=lambda data: data + b" with a temperature")
    with Bundle.open(path) as bundle:
        assert bundle.read("onnx/chain.onnx") == b"another with a temperature"
        bundle.verify()
        assert "onnx/chain.onnx" not in bundle.manifest.entries


def test_opening_looks_at_the_crc_of_weights_and_all_else_at_their_hash(copy, tmp_path):
    """No SHA-256 of half a gigabyte at each start."""
    entries = read_entries(copy)
    entries[WEIGHTS] = bytes(len(entries[WEIGHTS]))
    manifest = json.loads(entries["manifest.json"])
    manifest["entries"][WEIGHTS]["crc32"] = f"{zlib.crc32(entries[WEIGHTS]):08x}"
    write_entries(copy, {**entries, "manifest.json": json.dumps(manifest).encode()})
    Pipeline.open(copy, "cpu").close()
    with Bundle.open(copy) as bundle:
        for use in (
            bundle.verify,
            lambda: bundle.read(WEIGHTS),
            lambda: bundle.extract(tmp_path / "out"),
            lambda: open_subject(copy, "cpu"),  # the self-check
        ):
            with pytest.raises(BundleError, match=r"onnx/expert_3\.weights do not match"):
                use()
