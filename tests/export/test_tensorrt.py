"""The gate: the vendor's own parser and builder take every graph, for several compute capabilities. No GPU needed."""

import dataclasses

import pytest

from mge_export.precision import Precision
from mge_runtime.bundle import Bundle, GraphModel, write_bundle
from mge_runtime.errors import BuildError
from mge_runtime.trt.target import turing_refusal
from tests.helpers.engines import build_all

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra `rtx`)")

GRAPHS = ("expert_1", "expert_2")


def test_every_graph_is_built_in_its_precision(exported):
    sizes, precision = build_all(exported.path, "sm86", "sm120", batch="1,2,8")
    assert tuple(sizes) == GRAPHS
    for name, graph in exported.graphs.items():
        assert precision[name]["attested"] == "network"
        convolutions = sum(node.op_type == "Conv" for node in graph.graph.node)
        wanted = "float16" if exported.precision is Precision.FP16 else "float32"
        assert precision[name]["layers"]["CONVOLUTION"] == {wanted: convolutions}
        assert sizes[name] > exported.result.manifest.entries[f"onnx/{name}.weights"].size  # an engine holds them


def test_every_graph_is_built_in_int8(quantized):
    sizes, precision = build_all(quantized.path, "sm86", "sm120", batch="1,2,8")
    assert tuple(sizes) == GRAPHS
    for graph, convolutions in zip(GRAPHS, (15, 29), strict=True):
        assert (precision[graph]["type"], precision[graph]["attested"]) == ("int8", "network")
        assert precision[graph]["layers"]["CONVOLUTION"] == {"float16": convolutions}
        assert quantized.manifest.precision[graph]["quantized"]["convolutions"] > 0  # which the build counted


# --- Turing -------------------------------------------------------------------------------------------------------


def test_half_heads_predict_nearly_as_full_ones(tiny, photographs):
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


def test_turing_refuses_fp32_heads_before_and_in_the_builder(exported):
    with Bundle.open(exported.path) as bundle:
        assert "graph expert_1 cannot run on sm75: its " in turing_refusal(bundle.manifest)
    # The rule is the library's own.
    with pytest.raises(BuildError, match=r"cannot build graph expert_1: .*FP32 GEMM is not supported"):
        build_all(exported.path, "sm75")


# --- graphs that are not what the manifest says -------------------------------------------------------------------


def relabeled(manifest, folder, path, graph, **precision):
    """The graphs of a folder, in a bundle whose manifest tells another precision of one of them."""
    models = {}
    for name in GRAPHS:
        files = [folder / f"{name}.{suffix}" for suffix in ("onnx", "weights", "cpu.onnx")]
        models[name] = GraphModel(*(file if file.exists() else None for file in files))
    plan = {**manifest.precision[graph], **precision}
    write_bundle(path, dataclasses.replace(manifest, precision={**manifest.precision, graph: plan}), models)
    return path


def test_a_graph_that_is_not_its_precision_plan_is_refused(exported, tmp_path):
    found, claimed = ("float32", "fp16") if exported.precision is Precision.FP32 else ("float16", "fp32")
    manifest = exported.result.manifest
    operators = manifest.precision["expert_1"]["operators"]
    (kind, count), *_ = operators["Conv"].items()
    # The last is an operator of the attention in another type than planned; its node is named.
    island = r"node 'node_sub\w*' \(Sub\) computes in float32; the precision plan has float16"
    for wrong, message in (
        ({"type": claimed}, rf"graph expert_1: \d+ convolutions compute in {found}; expected"),
        ({"operators": {**operators, "Conv": {kind: count - 1}}}, "the parsed network has the convolutions"),
        ({"operators": {**operators, "Sub": {"float16": 1}}}, island),
    ):
        path = relabeled(manifest, exported.folder, tmp_path / "mge.plan", "expert_1", **wrong)
        with pytest.raises(BuildError, match=message):
            build_all(path, "sm86")


def test_a_bundle_that_tells_of_more_int8_than_it_has_is_refused(quantized, tmp_path):
    told = {**quantized.manifest.precision["expert_2"]["quantized"], "convolutions": 99}
    path = relabeled(quantized.manifest, quantized.folder, tmp_path / "mge.plan", "expert_2", quantized=told)
    with pytest.raises(BuildError, match=r"graph expert_2: \d+ convolutions read two DequantizeLinear; expected 99"):
        build_all(path, "sm86")
