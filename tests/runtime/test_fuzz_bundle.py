"""Mutated archives and forged documents end in documented errors, or in a bundle that predicts."""

import contextlib
import hashlib
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mge_runtime import MGEError, Pipeline
from mge_runtime.bundle import Bundle, add_calibration
from mge_runtime.cli.info import describe
from mge_runtime.cli.info_text import info_lines
from mge_runtime.errors import printable
from mge_runtime.machine import Machine
from mge_runtime.trt.engines import EngineDetails
from mge_runtime.trt.target import BatchRange
from tests.helpers.bundles import TARGET, add_engines, read_entries, write_entries
from tests.helpers.damage import fuzz

ENGINE = f"engines/{TARGET}/engine.json"
MACHINE = Machine.from_json((Path(__file__).parent / "machines" / "t4-tensorrt-10.13.json").read_bytes())
FRAME = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)


class Entries(dict):
    """Whose bytes no report of a failure shows."""

    def __repr__(self):
        return f"{len(self)} entries"


@pytest.fixture(scope="module")
def entries(bundle_path, tmp_path_factory):
    """Those of a bundle with everything in it."""
    path = tmp_path_factory.mktemp("fuzz") / "full.plan"
    path.write_bytes(bundle_path.read_bytes())
    logits = ("mean_logits_1", "mean_logits_2", "logits")
    exits = {"epsilon": 0.01, "delta": 0.05, "thresholds": dict.fromkeys(logits[:-1], 0.5)}
    add_calibration(path, {"temperatures": dict.fromkeys(logits, 1.5), "exits": exits, "runs_on": None, "data": {}})
    details = EngineDetails(
        "10.3.0.30", MACHINE.gpus[0], BatchRange(1, 1, 8), {"gate": {"type": "fp32"}}, {"workspace": 1}, "mge"
    )
    add_engines(path, details=details.to_dict())
    return Entries(read_entries(path))


def use(path, *, run):
    """Everything that reads a bundle without a GPU; any error but an `MGEError` of one printable line fails."""
    lines = []
    for step in (look, predict) if run else (look,):
        try:
            step(path)
        except MGEError as error:
            lines.append(str(error))
    assert not any("\n" in line for line in lines)


def look(path):
    with Bundle.open(path) as bundle:
        with contextlib.suppress(MGEError):
            bundle.verify()
        facts = describe(bundle, MACHINE)
        json.dumps(facts, allow_nan=False).encode()
        for everything in (False, True):
            lines = list(info_lines(facts, bundle.manifest, MACHINE, everything=everything))
            assert lines == [*map(printable, lines)]
        assert len(bundle.sha256) == 64


def predict(path):
    with Pipeline.open(path, device="cpu", threads=1) as pipeline:
        for exit in ("never", "calibrated") if pipeline.calibrated.exits else ("never",):
            found = pipeline.predict(FRAME[0], exit=exit)
            assert 0 <= found.probability <= 1
            assert np.isfinite(found.boxes).all()
            assert json.dumps(found.to_dict(), allow_nan=False).encode()


@fuzz(125)
@given(data=st.data())
def test_mutated_archives(entries, tmp_path, data):
    path = tmp_path / "mge.plan"
    write_entries(path, entries)
    whole = bytearray(path.read_bytes())
    # Most of a file is padding and weights: what says where things lie comes into every other case.
    headers = [m.start() + o for m in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06)", whole) for o in range(46)]
    place = st.one_of(st.integers(0, len(whole) - 1), st.sampled_from([h for h in headers if h < len(whole)]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = min(data.draw(place), max(len(whole) - 1, 0))
        how = data.draw(st.sampled_from(["set", "cut", "drop", "insert", "repeat"]))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        if how == "set":
            whole[at : at + len(piece)] = piece
        elif how == "cut":
            del whole[at:]
        elif how == "drop":
            del whole[at : at + len(piece)]
        elif how == "insert":
            whole[at:at] = piece
        else:
            whole[at:at] = whole[at : at + 4096]
    path.write_bytes(whole)
    use(path, run=False)


ODD_NUMBERS = (10**400, -1, 0, 2**31, 2**53, 2**63, 5e-324, 1e308, math.nan, math.inf)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from(ODD_NUMBERS))
TEXTS = st.one_of(
    st.text(st.characters(), max_size=20),  # of UTF-8 alone it would first list every character, for 5 s
    st.text(st.characters(categories=["Cc", "Cs", "Cf", "Zl", "Zp", "Co"]), max_size=5),
    st.sampled_from(["", "batch", "frame", "logits", "gate", "float32", "float64", "../evil", "a" * 5000, "0" * 64]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


def places(value, path=()):
    """Every path into a document."""
    yield path
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield from places(member, (*path, key))


def mutate(data, root):
    """Replace, remove, add, move or nest a few values of a document."""
    for _ in range(data.draw(st.integers(1, 3))):
        paths = list(places(root))[1:]
        if not paths:
            break
        path = data.draw(st.sampled_from(paths))
        node = root
        for key in path[:-1]:
            node = node[key]
        key, how = path[-1], data.draw(st.sampled_from(["replace", "remove", "add", "copy", "nest"]))
        if how == "replace":
            node[key] = data.draw(VALUES)
        elif how == "remove":
            del node[key]
        elif how == "add" and isinstance(node, dict):
            node[data.draw(TEXTS)] = data.draw(VALUES)
        elif how == "add":
            node.append(data.draw(VALUES))
        elif how == "copy":
            other = root
            for step in data.draw(st.sampled_from(paths)):
                other = other[step]
            node[key] = json.loads(json.dumps(other))
        else:
            for _ in range(data.draw(st.sampled_from([1, 40, 250]))):
                node[key] = [node[key]]
    return root


def dumped(root):
    return json.dumps(root).encode()  # NaN, Infinity and halves of surrogates as a forger would write them


@fuzz(125)
@given(data=st.data())
def test_forged_manifests(entries, tmp_path, data):
    manifest = mutate(data, json.loads(entries["manifest.json"]))
    models = {name: content for name, content in entries.items() if name.startswith("onnx/")}
    if isinstance(manifest.get("entries"), dict) and data.draw(st.booleans()):
        for name, content in models.items():
            digest, crc = hashlib.sha256(content).hexdigest(), f"{zlib.crc32(content):08x}"
            manifest["entries"][name] = {"sha256": digest, "size": len(content), "crc32": crc}
    signed = dumped(manifest)
    calibration = {**json.loads(entries["calibration.json"]), "manifest_sha256": hashlib.sha256(signed).hexdigest()}
    write_entries(tmp_path / "mge.plan", {**models, "manifest.json": signed, "calibration.json": dumped(calibration)})
    use(tmp_path / "mge.plan", run=True)


@fuzz(125)
@given(data=st.data())
def test_forged_calibrations_and_engines(entries, tmp_path, data):
    name = data.draw(st.sampled_from(["calibration.json", ENGINE]))
    forged = dumped(mutate(data, json.loads(entries[name])))
    write_entries(tmp_path / "mge.plan", {**entries, name: forged})
    use(tmp_path / "mge.plan", run=name == "calibration.json")
