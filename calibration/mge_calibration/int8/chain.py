"""Quantise a chain of graphs, each on the real outputs of the quantised ones before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from mge_calibration.int8.agreement import Agreement, relative_error
from mge_calibration.int8.follow import FloatChain, small
from mge_calibration.int8.graph import Int8Options, Judge, QuantizedGraph, quantize_graph
from mge_calibration.int8.sessions import Run, Tensors, default_workers, open_graph, run_all
from mge_runtime.manifest import GraphSpec

__all__ = ["quantize_chain"]

# A later expert still has to be quantised, and its own box must not then fall below the limit. Measured on photographs
# with EfficientNet-Lite0: that costs the median IoU up to 0.005, and 122 images leave it a standard error of 0.01.
_HEADROOM = 0.01


def quantize_chain(
    graphs: Sequence[GraphSpec],
    models: Mapping[str, onnx.ModelProto],
    trunk_weight: Callable[[str], bool],
    frames: np.ndarray,
    options: Int8Options,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, QuantizedGraph]:
    """Quantise the backbones of a chain.

    Expert k sees the crops that quantised experts make of the images, which are not quite those of the float model
    (`options.float_crops` calibrates on the latter).

    Each graph is judged by what it does to the chain: the graphs before it quantised, those after it still in floats,
    its answer and boxes against the float chain's. So after the last graph the limits hold for the chain as it will
    run (not with `options.float_crops`). A box needs more than its own expert: a crop that moved by a pixel is another
    image to the next expert, whose box then moves further.

    Args:
        graphs: in the order they run.
        models: by graph name, with their weights; left as they are.
        trunk_weight: whether an initialiser is a convolution's weight in a backbone.
        frames: uint8 [N, S, S, 3], the chain's input.
        options: how.
        say: shows progress.

    Returns:
        By name, all graphs.
    """
    chain = FloatChain(graphs, models, frames)
    tensors: Tensors = dict(chain.input)
    done: dict[str, QuantizedGraph] = {}
    for index, graph in enumerate(graphs):
        judge = _judge(chain, graph, tensors, options)
        result = quantize_graph(models[graph.name], trunk_weight, tensors, judge, options)
        done[graph.name] = result
        say(_line(graph.name, result))
        # Images are large and only the next experts want them.
        wanted = {tensor.name for later in graphs[index + 1 :] for tensor in later.inputs}
        made = chain.run(graph, tensors) if options.float_crops else _run(result.model, graph, tensors)
        tensors = {name: value for name, value in (tensors | made).items() if value.ndim < 4 or name in wanted}
    layers = sum(len(result.layers) for result in done.values())
    left = sum(len(result.left) for result in done.values())
    if layers < left:
        say(
            f"hint: {layers} of {layers + left} layers are in INT8, which saves little; boxes that may move further "
            "(--min-box-iou) or more answers that may change (--max-drop) let more in"
        )
    return done


def _judge(chain: FloatChain, graph: GraphSpec, tensors: Tensors, options: Int8Options) -> Judge:
    """Judge variants of a graph.

    Args:
        chain: in floats.
        graph: whose variants.
        tensors: what the graphs before it put out, over all images.
        options: the limits.

    Returns:
        Run of a variant -> its agreement, and whether it is within the limits.
    """
    outputs = [tensor.name for tensor in graph.outputs]
    boxes = chain.boxes_moved_by(graph)
    least = {name: _least(options.min_box_iou, later) for later, name in enumerate(boxes)}
    later = {t.name for other in chain.graphs for t in other.outputs} - tensors.keys()
    known = tensors | chain.reference(later - set(outputs))  # float results of what the graph does not change, too
    own = small(chain.run(graph, tensors))

    def judge(run: Run) -> tuple[Agreement, bool]:
        found = run_all(
            lambda batch: small(chain.finish(dict(batch) | run(batch), outputs)), known, workers=default_workers()
        )
        changed = chain.changed_classes(found)
        error = relative_error({name: found[name] for name in own}, own)
        agreement = Agreement(len(found[outputs[0]]), changed, chain.median_iou(found, boxes), error)
        return agreement, agreement.within(options.max_drop, least)

    return judge


def _least(min_box_iou: float, later: int) -> float:
    """What a box must keep where so many experts still move it; never more than half of what is left to 1."""
    return min_box_iou + min(_HEADROOM * later, (1 - min_box_iou) / 2) if min_box_iou else 0.0


def _run(model: onnx.ModelProto, graph: GraphSpec, tensors: Tensors) -> Tensors:
    inputs = {tensor.name: tensors[tensor.name] for tensor in graph.inputs}
    return run_all(open_graph(model), inputs, workers=default_workers())


def _line(graph: str, result: QuantizedGraph) -> str:
    total, found = len(result.layers) + len(result.left), result.agreement
    text = (
        f"{graph}: {len(result.layers)} of {total} layers in INT8; the chain answers {100 * found.same_class:.1f} % "
        f"the same ({100 * result.all_layers.same_class:.1f} % with all)"
    )
    if found.box_iou:
        text += "; box IoU: " + ", ".join(f"{name} {iou:.3f}" for name, iou in found.box_iou.items())
    if result.left:
        shown = ", ".join(layer.name for layer in result.left[:6])
        text += f"; left in FP16: {shown}" + (f" and {len(result.left) - 6} more" if len(result.left) > 6 else "")
    return text
