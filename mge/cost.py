"""What a chain costs, expert by expert: multiply-accumulates of one image, and milliseconds on this machine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from mge_runtime.machine import cpu_count, cpu_model

if TYPE_CHECKING:
    from mge.model import Expert, MGENet
    from mge_runtime.pipeline import Pipeline


RUNS = 20  # of one image, that are timed
_WARM_UP = 2  # before, which do not count


@dataclass(frozen=True)
class Cost:
    """What one image costs. Everything up to expert k is in place k, from 0; the last place is the whole chain's.

    A bundle computes its gate with the last expert, so its last two places are the same.
    """

    gmacs: tuple[float, ...]  # [K + 1], convolutions and matrix products, billions of multiply-accumulates
    ms: tuple[float, ...]  # [K + 1], median of `RUNS` of one image
    measured: str  # with what and where, for people

    def place(self, head: str) -> int:
        """Where the cost of a head's logits stands: "expert 2 global", "average 1-2", "average", "mixture"."""
        if numbers := re.findall(r"\d+", head):
            return int(numbers[-1]) - 1
        return len(self.gmacs) - (2 if head == "average" else 1)


def count_gmacs(model: MGENet) -> tuple[float, ...]:
    """Convolutions and matrix products of one image, up to each expert and of the whole: [K + 1], in billions.

    What only training reads is left out: the part head, and the global head for the loss. Crops and attention have none
    of these operators.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        found = _up_to_each(model, counter.get_total_flops)
    experts = cast("Sequence[Expert]", model.experts)
    unread = np.cumsum([e.part_head.weight.numel() + e.global_head.fc.weight.numel() for e in experts])
    return tuple(float((value // 2 - unread[min(k, len(unread) - 1)]) / 1e9) for k, value in enumerate(found))


def model_cost(model: MGENet) -> Cost:
    """Count a model's operations and time it in PyTorch, on the CPU; it is in evaluation mode."""
    import torch

    runs = [_up_to_each(model, time.perf_counter) for _ in range(_WARM_UP + RUNS)]
    return Cost(count_gmacs(model), _medians(runs), f"PyTorch {torch.__version__}, {_cpu(torch.get_num_threads())}")


def bundle_cost(pipeline: Pipeline, threads: int | None) -> Cost:
    """Read a bundle's operations and time it, stopping after each of its experts.

    Args:
        pipeline: with one stream, so that a run has all its threads.
        threads: that the pipeline was opened with.
    """
    manifest, choice = pipeline.manifest, pipeline.choice
    side, runs = manifest.preprocess.size, list[list[float]]()
    frame = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    for _ in range(_WARM_UP + RUNS):
        run: list[float] = []
        for k in range(1, len(manifest.graphs) + 1):
            start = time.perf_counter()
            pipeline.run(frame, exit=k)
            run.append(time.perf_counter() - start)
        runs.append([*run, run[-1]])
    gmacs = np.cumsum([manifest.gmacs[graph.name] for graph in manifest.graphs]).tolist()
    where = _cpu(threads or cpu_count()) if choice.device == "cpu" else choice.device
    return Cost((*gmacs, gmacs[-1]), _medians(runs), f"{choice.backend}, {where}")


def _cpu(threads: int) -> str:
    return f"{threads} {'threads' if threads > 1 else 'thread'} of {cpu_model()}"


def _medians(runs: list[list[float]]) -> tuple[float, ...]:
    """Seconds to milliseconds."""
    return tuple((1e3 * np.median(runs[_WARM_UP:], axis=0)).tolist())


def _up_to_each(model: MGENet, read: Callable[[], float]) -> list[float]:
    """Run one image: what a counter has gained when each expert is done, and at the end, [K + 1]."""
    import torch

    image = torch.rand(1, 3, model.config.frame_size, model.config.frame_size)
    start, marks = read(), list[float]()
    parts = [
        *{cast("Expert", expert).backbone: None for expert in model.experts},
        *([] if model.gate is None else [model.gate]),
    ]
    hooks = [part.register_forward_pre_hook(lambda *_: marks.append(read())) for part in parts]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    _, *begun = marks  # what follows expert k begins when it is done: the next one, or the gate
    end = read()
    return [mark - start for mark in (*begun, *[end] * (len(model.experts) + 1 - len(begun)))]
