"""What a run refuses to predict from: a file that was overwritten, outputs not finite or not of their shape."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from mge_runtime import BackendError, BundleError, Pipeline
from mge_runtime.backends.onnxruntime import CpuExecutor
from mge_runtime.bundle import Bundle
from mge_runtime.calibrated import ExitPoint
from tests.helpers.chain_runs import EXECUTORS, open_chain, write_chain


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(3).integers(0, 256, (3, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """The next training: the same classes and shapes, other weights."""
    path = tmp_path_factory.mktemp("other") / "new.plan"
    tiny.write_tiny_bundle(path, seed=1)
    return path


@pytest.fixture(params=EXECUTORS)
def executor(request):
    return request.param


# --- the file -----------------------------------------------------------------------------------------------------


def test_a_bundle_overwritten_in_place_is_refused_before_it_runs(copy, other, frames, executor):
    chain = open_chain(copy, executor)
    chain.run(frames)
    subprocess.run(["cp", other, copy], check=True)
    for _ in range(2):
        with pytest.raises(
            BundleError, match=r"mge.plan was overwritten while it was open.*replace .* by a rename \(mv\)"
        ):
            chain.run(frames)
    chain.close()


def test_one_that_is_overwritten_during_a_run_is_not_predicted_from(copy, other, frames, monkeypatch):
    run = CpuExecutor.run

    def late(*args):
        result = run(*args)
        copy.write_bytes(other.read_bytes())
        return result

    with Pipeline.open(copy, device="cpu", threads=1) as pipeline:
        monkeypatch.setattr(CpuExecutor, "run", late)
        with pytest.raises(BundleError, match="was overwritten"):
            pipeline.predict(frames[0])


@pytest.mark.parametrize("how", ["rename", "in place"])
def test_one_that_is_replaced_while_it_opens_is_refused(copy, other, tmp_path, monkeypatch, how):
    read, aside = Bundle.read, tmp_path / "aside.plan"
    aside.write_bytes(other.read_bytes())

    def late(bundle, name):
        data = read(bundle, name)
        if name == "onnx/expert_3.onnx":  # the last
            if how == "rename":
                aside.replace(copy)
            else:
                with copy.open("r+b") as stream:
                    stream.write(other.read_bytes())
        return data

    monkeypatch.setattr(Bundle, "read", late)
    with pytest.raises(BundleError, match=r"replaced while it was being opened|do not match their hash"):
        Pipeline.open(copy, device="cpu", threads=1)


def test_damaged_weights_are_refused(copy, executor):
    with Bundle.open(copy) as bundle:
        offset = bundle.entry("onnx/expert_2.weights").offset
    with copy.open("r+b") as stream:
        stream.seek(offset + 100)
        stream.write(b"\x55")
    with pytest.raises(BundleError, match=r"onnx/expert_2\.weights do not match"):
        open_chain(copy, executor)


def test_a_bundle_replaced_by_a_rename_goes_on_as_it_was(copy, other, frames, executor):
    chain = open_chain(copy, executor)
    before = chain.run(frames).tensors
    aside = copy.with_name("aside.plan")
    aside.write_bytes(other.read_bytes())
    aside.replace(copy)
    after = chain.run(frames).tensors
    chain.close()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_weights_that_are_loaded_do_not_change_with_the_file(copy, other, frames, executor):
    mapped = open_chain(copy, executor)
    expected = mapped.run(frames).tensors
    mapped.close()
    chain = open_chain(copy, executor, maps_weights=False)
    copy.write_bytes(other.read_bytes())
    copy.write_bytes(b"")  # a page of it that was still mapped would end the process
    found = chain.run(frames).tensors
    chain.close()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_weights_are_loaded_where_a_pipeline_is_told_to(copy, frames):
    with Pipeline.open(copy, device="cpu", threads=1, mmap=False) as pipeline:
        expected = pipeline.predict(frames[0]).logits
        os.truncate(copy, 0)
        np.testing.assert_array_equal(pipeline.predict(frames[0]).logits, expected)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_no_descriptor_is_left_open(bundle_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for mmap in (True, False):
        Pipeline.open(bundle_path, device="cpu", threads=1, mmap=mmap).close()
    with pytest.raises(BackendError):
        Pipeline.open(bundle_path, device="cpu", exit=9)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- outputs ------------------------------------------------------------------------------------------------------


def rewrite_chain(tiny, path, output, *nodes, initializers=()):
    """Write a tiny bundle one of whose outputs passes through further nodes, from "was" to its name."""

    def change(graph):
        if output in {tensor.name for tensor in graph.spec.outputs}:
            for node in graph.nodes:
                node.output[:] = ["was" if name == output else name for name in node.output]
            graph.nodes += nodes
            graph.initializers += initializers
        return graph.model()

    return write_chain(tiny, path, change)


def poison(tiny, path, output, value):
    """Write a tiny bundle that adds `value` to one output."""
    added = helper.make_tensor("added", TensorProto.FLOAT, [1], [value])
    return rewrite_chain(tiny, path, output, helper.make_node("Add", ["was", "added"], [output]), initializers=[added])


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize(
    ("graph", "output"),
    [("expert_1", "heatmap_1"), ("expert_2", "box_2"), ("expert_3", "heatmap_3"), ("expert_2", "logits_2"),
     ("expert_3", "gate"), ("expert_3", "logits")],
)  # fmt: skip
def test_an_output_that_is_not_finite_is_named_with_its_graph(tiny, tmp_path, frames, graph, output, value, executor):
    chain = open_chain(poison(tiny, tmp_path / "mge.plan", output, value), executor)
    with pytest.raises(BackendError, match=rf"^the output {output} of the graph {graph} holds NaN or infinity"):
        chain.run(frames)
    chain.close()


def test_images_that_stop_early_are_checked_too(tiny, tmp_path, frames, executor):
    chain = open_chain(poison(tiny, tmp_path / "mge.plan", "heatmap_1", np.nan), executor)
    for options in ({"exits": [ExitPoint(1, "mean_logits_1", 1.0, 0.0)]}, {"graphs": 1}, {"outputs": []}):
        with pytest.raises(BackendError, match="the output heatmap_1 of the graph expert_1"):
            chain.run(frames, **options)
    chain.close()


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Concat", ["was", "was"], ["logits"], axis=1),
        helper.make_node("Transpose", ["was"], ["logits"], perm=[1, 0]),
        helper.make_node("Concat", ["was", "was"], ["logits"], axis=0),
    ],
    ids=["classes", "order", "batch"],
)
def test_a_graph_that_does_not_keep_its_shape_is_refused(tiny, tmp_path, frames, node):
    with pytest.raises(BundleError, match=r"logits.*the manifest says"):
        open_chain(rewrite_chain(tiny, tmp_path / "mge.plan", "logits", node)).run(frames)


@pytest.mark.parametrize(
    ("was", "is_now", "kind", "message"),
    [
        (b"Softmax", b"Softmix", BackendError, "cannot open graph expert_3: .*Soft"),
        (b"heatmap_3", b"heatmap_9", BundleError, "the output 'heatmap_3' as none .*; the manifest says float32"),
    ],
)
def test_a_graph_that_is_not_what_it_should_be_is_named(tiny, tmp_path, was, is_now, kind, message, executor):
    def change(graph):
        model = graph.model()
        return replace(model, graph=model.graph.replace(was, is_now))

    path = write_chain(tiny, tmp_path / "mge.plan", change)
    with pytest.raises(kind, match=message):
        open_chain(path, executor)


def test_a_graph_that_fails_is_named(copy, frames):
    chain = open_chain(copy, "cpu")
    with pytest.raises(BackendError, match="failed in graph expert_1"):
        chain.run(frames.astype(np.float32))
    chain.close()


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (3, 32, 7)), ("float32", (3, 32)), ("float16", (3, 32, 32))])
def test_inputs_and_outputs_are_compared_with_the_manifest_when_a_graph_opens(tiny, tmp_path, dtype, shape, executor):
    def told(tensors):
        wrong = {"dtype": dtype, "shape": ("batch", *shape)}
        return tuple(replace(tensor, **wrong) if tensor.name == "image_3" else tensor for tensor in tensors)

    def say(made):
        return replace(
            made, graphs=tuple(replace(g, inputs=told(g.inputs), outputs=told(g.outputs)) for g in made.graphs)
        )

    path = write_chain(tiny, tmp_path / "mge.plan", manifest=say)
    with pytest.raises(BundleError, match=r"has the output 'image_3' as float32 .*; the manifest says"):
        open_chain(path, executor)
