import json
from dataclasses import replace

import pytest

from mge_runtime.errors import BundleError
from mge_runtime.manifest import SCHEMA_VERSION, Entry, Manifest


@pytest.fixture
def manifest(tiny):
    entries = {"onnx/expert_3.onnx": Entry("0" * 64, 7, "0" * 8)}
    return replace(tiny.make_manifest(tiny.make_graphs()), entries=entries)


def edited(manifest, path, value):
    """The manifest's JSON with one field replaced (or removed, where the value is `KeyError`)."""
    root = json.loads(manifest.to_json())
    node = root
    for key in path[:-1]:
        node = node[key]
    if value is KeyError:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return json.dumps(root).encode()


def test_comes_back_equal(manifest):
    full = replace(
        manifest, checkpoint_sha256="ab" * 32, parity={"graphs": {"gate": {"abs": 1e-6}}}, class_names=tuple("äöü日x")
    )
    for written in (full, manifest):
        assert Manifest.from_json(written.to_json()) == written
    assert manifest.logits == "logits"


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("class_names", 2), 7, r"class_names\[2\] is 7; expected a text"),
        (("class_names",), [], "class_names"),
        (("graphs", 1, "outputs", 0, "shape", 1), "many", r"graphs\[1\]\.outputs\[0\]\.shape\[1\]"),
        (("graphs", 1, "outputs", 0, "shape"), [1, 5], r"graphs\[1\]\.outputs\[0\]\.shape"),
        (("graphs", 1, "outputs", 0, "shape", 1), True, r"shape\[1\] is true"),
        (("preprocess", "size"), 0, r"preprocess\.size"),
        (("preprocess", "resize"), 8, r"preprocess\.resize is 8; expected a whole number from 32"),
        (("preprocess", "mean"), [0.5, 0.5], r"preprocess\.mean"),
        (("preprocess", "mean", 0), "0.5", r"preprocess\.mean\[0\]"),
        (("precision", "expert_1", "type"), [], r"precision\.expert_1\.type is \[\]; expected a text"),
        (("views", 0, "box"), 3, r"views\[0\]\.box"),
        (("entries", "onnx/expert_3.onnx", "sha256"), "xyz", r"sha256"),
        (("entries", "onnx/expert_3.onnx", "crc32"), "12345", r"crc32 is \"12345\"; expected 8 hexadecimal digits"),
        (("entries", "onnx/expert_3.onnx", "size"), -1, r"entries\.onnx/expert_3\.onnx\.size"),
        (("tools",), [], "tools is "),
        (("gate",), KeyError, "gate"),
        (("extra",), 1, "extra is 1; expected no field of this name"),
        (("schema_version",), KeyError, "schema_version"),
        (("schema_version",), "1", "schema_version"),
        (("class_names", 0), "a" * 256, r'class_names\[0\] is "a+\.\.\.; expected a text of at most 255 characters'),
        (("class_names", 0), "\x1b[2Jred", r'class_names\[0\] is "\\u001b\[2Jred"; .*without control characters'),
        (("class_names", 0), "c1 \x9b31m", r'class_names\[0\] is "c1 \\u009b31m"; .*without control characters'),
        (("class_names", 0), "two\nlines", r"class_names\[0\] is .*without control characters"),
        (("class_names", 1), "bird 0", r"class_names\[1\] is \"bird 0\"; expected a name that no other class has"),
        (("preprocess", "size"), 16384, r"preprocess\.size is 16384; expected a whole number from 2 to 4096"),
        (("preprocess", "resize"), 32768, r"preprocess\.resize is 32768; expected a whole number from 32 to 128"),
        (("preprocess", "std", 0), 0, r"preprocess\.std\[0\] is 0; expected a number from 1e-06 to 1000"),
        (("preprocess", "mean", 1), -1e300, r"preprocess\.mean\[1\] is -1e\+300; expected a number from -1000 to 1000"),
        (("graphs", 1, "outputs", 0, "shape"), ["batch", 2**20, 2**20], r"outputs\[0\]\.shape .*at most 268435456 el"),
        (("graphs",), [{}] * 257, "expected at most 256 graphs"),
        (("tools", "\x1b[2J"), 3, r"manifest\.json: 'tools\.\\x1b\[2J' is 3; expected a text"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(manifest, path, value, named):
    with pytest.raises(BundleError, match=named):
        Manifest.from_json(edited(manifest, path, value))


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_another_schema_is_named_even_if_all_else_changed(version):
    data = json.dumps({"schema_version": version, "anything": {}}).encode()
    with pytest.raises(BundleError, match=rf"schema version {version}.*upgrade mge, or export again"):
        Manifest.from_json(data)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("1" * 401, "a number has 401 digits"),
        ("-1e999", "-1e999 is beyond every number"),
        ("[" * 900 + "]" * 900, "nested more than 32 deep"),
        ('{"a": ' * 40 + "1" + "}" * 40, "nested more than 32 deep"),
        (r'"\ud800"', "surrogates not allowed"),
        (r'{"\ud800": 1}', "surrogates not allowed"),
        ('{"a": 1, "a": 2}', "two members of the same name"),
        ("[" + "[]," * 1_500_000 + "[]]", r"has \d+ bytes; expected at most 4194304"),
    ],
)
def test_what_would_break_its_readers_is_refused_wherever_it_lies(manifest, value, named):
    data = edited(manifest, ("model", "arch"), "here").replace(b'"here"', value.encode())
    with pytest.raises(BundleError, match=named) as caught:
        Manifest.from_json(data)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_names_of_classes_may_be_of_any_script(manifest):
    names = ("rouge-gorge\u00a0familier", "क्\u200dष", "クロツグミ", "👩\u200d🌾", "=cmd|'/C calc'!A0")
    assert Manifest.from_json(replace(manifest, class_names=names).to_json()).class_names == names


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"schema_version": NaN}', b"[" * 100_000, b"[1]"])
def test_what_is_no_json_object_is_refused(data):
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Manifest.from_json(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("graphs",), [], "expected at least one, "),
        (("graphs", 1, "name"), "expert_1", "at least one, and names that differ"),
        (("graphs", 0, "name"), "chain", "called 'chain'"),
        (("graphs", 0, "name"), "../evil", "called '../evil'"),
        (("graphs", 1, "inputs", 0, "name"), "image_9", "'image_9', no output of one before it"),
        (("graphs", 1, "inputs", 0, "dtype"), "float16", "the input 'image_2' as float16"),
        (("graphs", 0, "inputs", 0, "shape"), ["batch", 16, 16, 3], "expert_1 has the input 'frame'"),
        (("graphs", 1, "outputs", 2, "dtype"), "float64", "of type 'float64'"),
        (("graphs", 1, "outputs", 1, "name"), "heatmap_1", "an output of expert_2 and of a graph before it"),
        (("graphs", 2, "logits"), "gate", "the logits after expert_3 is tensor 'gate'"),
        (("graphs", 0, "logits"), "logits", "the logits after expert_1 is tensor 'logits'"),
        (("gmacs",), {"expert_1": 1.0}, "gmacs are of"),
        (("gate",), "logits_1", "the gate is tensor"),
        (("views",), [], "there is no view"),
        (("views", 1, "box"), "gate", "the box of view 2"),
        (("views", 2, "box"), None, "null for the first view alone"),
    ],
)
def test_chains_that_do_not_fit_are_refused(manifest, path, value, message):
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(edited(manifest, path, value))


def test_one_quantized_graph_makes_a_bundle_int8(manifest):
    assert not manifest.is_int8
    half = {name: {"type": "fp16"} for name in manifest.precision}
    assert not replace(manifest, precision=half).is_int8
    mixed = replace(manifest, precision={**half, "expert_2": {"type": "int8"}})
    assert mixed.is_int8
    assert Manifest.from_json(mixed.to_json()).is_int8
    assert not replace(manifest, precision={"expert_3": {"attested": "a plan without a type"}}).is_int8
