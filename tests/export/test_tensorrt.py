"""The gate: the vendor's own parser and builder take every graph, for several compute capabilities. No GPU needed."""

import dataclasses

import pytest

from mge_export.export import export_bundle
from mge_export.images import generated_images
from mge_export.precision import Precision
from mge_runtime.bundle import Bundle, GraphModel, write_bundle
from mge_runtime.errors import BuildError
from mge_runtime.files import temporary_folder
from mge_runtime.trt.build import ahead_of_time, build_engines
from mge_runtime.trt.builder import BuildOptions
from mge_runtime.trt.target import BatchRange, turing_refusal
from mge_runtime.trt.vendor import load_vendor

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")


@pytest.fixture(scope="module")
def rtx():
    return load_vendor("tensorrt-rtx")


def build_all(path, vendor, capabilities, batch):
    """Build a bundle's engines ahead of time; return the sizes of the plans and what was recorded."""
    with Bundle.open(path) as bundle:
        (target,) = ahead_of_time(vendor, capabilities)
        options = BuildOptions(BatchRange.parse(batch))
        with temporary_folder("test") as folder:
            new = build_engines(bundle, vendor, target, folder, gpu=None, options=options)
            return {graph: plan.stat().st_size for graph, plan in new.plans.items()}, new.details


@pytest.mark.parametrize("batch", ["1", "1,2,8"], ids=["batch-1", "dynamic"])
@pytest.mark.parametrize("capability", ["sm86", "sm120"])
def test_every_graph_is_built_in_its_precision(exported, rtx, capability, batch):
    sizes, details = build_all(exported.path, rtx, [capability], batch)
    assert set(sizes) == {"expert_1", "expert_2"}
    for name, graph in exported.graphs.items():
        assert details.precision[name]["attested"] == "network"
        convolutions = sum(node.op_type == "Conv" for node in graph.graph.node)
        wanted = "float16" if exported.precision is Precision.FP16 else "float32"
        expected = {wanted: convolutions} if convolutions else None
        assert details.precision[name]["layers"].get("CONVOLUTION") == expected
    entries = exported.result.manifest.entries
    weights = {name: entries[f"onnx/{name}.weights"].size for name in ("expert_1", "expert_2")}
    assert all(sizes[name] > size for name, size in weights.items())  # an engine holds its weights


def test_one_engine_serves_several_capabilities(exported, rtx):
    alone, _ = build_all(exported.path, rtx, ["sm86"], "1")
    together, _ = build_all(exported.path, rtx, ["sm120", "sm86", "sm89"], "1")
    assert together["expert_1"] < 1.1 * alone["expert_1"]


@pytest.fixture(scope="module")
def half_heads(tiny, tmp_path_factory):
    """The same model with its linear heads in half, as Turing needs them."""
    path = tmp_path_factory.mktemp("turing") / "mge.plan"
    model = tiny.make_model()
    images = generated_images(model.config.preprocess, 4)
    # Drawn images and untrained heads decide closely: what is held here is the build, not the parity.
    export_bundle(model, path, Precision.FP16, images, half_linear=True, allow_mismatch=True)
    return path


def test_turing_takes_half_heads(half_heads, rtx):
    _, details = build_all(half_heads, rtx, ["sm75"], "1,1,4")
    assert set(details.precision["expert_1"]["layers"]["MATRIX_MULTIPLY"]) == {"float16"}
    with Bundle.open(half_heads) as bundle:
        assert bundle.manifest.precision["expert_1"]["heads"] == "fp16"


def test_half_heads_answer_nearly_as_full_ones(tiny, photographs):
    import torch

    from mge_export.experts import build_graphs
    from mge_export.typed import HalfLinear

    model = tiny.make_model()
    frames = torch.from_numpy(tiny.load_frames(photographs, model.config.preprocess))
    full, half = (build_graphs(model, Precision.FP16, half_linear=flag) for flag in (False, True))
    assert sum(isinstance(m, HalfLinear) for m in half[0].modules()) == 4  # three heads, the attention's copy
    assert not any(isinstance(m, HalfLinear) for m in full[0].modules())
    with torch.no_grad():
        logits, expected = half[0](frames)[0], full[0](frames)[0]
    assert not torch.equal(logits, expected)
    assert (logits - expected).abs().max() <= 4e-3 * expected.abs().max()


def test_turing_refuses_fp32_heads_before_and_in_the_builder(exported, rtx):
    with Bundle.open(exported.path) as bundle:
        assert "graph expert_1 cannot run on sm75: its " in turing_refusal(bundle.manifest)
    # The rule is the library's own.
    with pytest.raises(BuildError, match=r"cannot build graph expert_1: .*FP32 GEMM is not supported"):
        build_all(exported.path, rtx, ["sm75"], "1")


def relabelled(exported, path, precision):
    """The exported graphs in a bundle whose manifest tells another precision of expert_1."""
    manifest = exported.result.manifest
    models = {}
    for graph in manifest.graphs:
        weights = exported.folder / f"{graph.name}.weights"
        models[graph.name] = GraphModel(exported.folder / f"{graph.name}.onnx", weights if weights.exists() else None)
    plan = {**manifest.precision["expert_1"], **precision}
    write_bundle(path, dataclasses.replace(manifest, precision={**manifest.precision, "expert_1": plan}), models)


def test_a_graph_offered_as_another_precision_is_refused(exported, rtx, tmp_path):
    found, claimed = ("float32", "fp16") if exported.precision is Precision.FP32 else ("float16", "fp32")
    relabelled(exported, tmp_path / "wrong.plan", {"type": claimed})
    with pytest.raises(BuildError, match=rf"graph expert_1: \d+ convolutions compute in {found}; expected"):
        build_all(tmp_path / "wrong.plan", rtx, ["sm86"], "1")


def test_a_graph_that_is_not_its_precision_plan_is_refused(exported, rtx, tmp_path):
    operators = dict(exported.result.manifest.precision["expert_1"]["operators"])
    (kind, count), *_ = operators["Conv"].items()
    relabelled(exported, tmp_path / "fewer.plan", {"operators": {**operators, "Conv": {kind: count - 1}}})
    with pytest.raises(BuildError, match="the parsed network has the convolutions"):
        build_all(tmp_path / "fewer.plan", rtx, ["sm86"], "1")
    # An operator of the attention in another type than planned; its node is named.
    relabelled(exported, tmp_path / "island.plan", {"operators": {**operators, "Sub": {"float16": 1}}})
    with pytest.raises(
        BuildError, match=r"node 'node_sub\w*' \(Sub\) computes in float32; the precision plan has float16"
    ):
        build_all(tmp_path / "island.plan", rtx, ["sm86"], "1")
