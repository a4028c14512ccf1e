"""Parts of a bundle's stages, opened as the stages themselves are.

A `PartBundle` is the same file with the same weights in place and other graphs, so the backend's own code opens it,
with the very same options.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, cast

from mge_runtime.bench.cut import Trunk, cut_graph, find_trunk
from mge_runtime.bundle import Bundle
from mge_runtime.bundle.layout import stage_graph
from mge_runtime.bundle.reader import WatchedFile
from mge_runtime.errors import BackendError
from mge_runtime.manifest import FRAME
from mge_runtime.spec import BATCH, SegmentSpec, StageSpec, TensorSpec

__all__ = ["HeadBundle", "PartBundle", "TrunkBundle", "TrunkChainBundle"]


class PartBundle(Bundle, ABC):
    """A bundle whose stages with a trunk are cut down; the others are left out.

    Raises:
        BundleError: as for `Bundle.open`, or a graph cannot be cut.
        BackendError: no stage has a trunk that can be told from its weights' names.
    """

    chained: ClassVar[bool] = False  # whether it is a chain that runs: from frames, all parts on the first image

    def __init__(self, file: WatchedFile, *, maps_weights: bool = True) -> None:
        super().__init__(file, maps_weights=maps_weights)
        self.trunks: dict[str, Trunk] = {}  # by stage, in the order they run
        self._graphs: dict[str, bytes] = {}
        stages: list[StageSpec] = []
        first: TensorSpec | None = None  # the image of the first trunk
        for name in [name for segment in self.manifest.segments for name in segment.stages]:
            graph = super().read(stage_graph(name))
            stage, trunk = self.manifest.stage(name), find_trunk(graph)
            if trunk is None:
                if self.chained and [tensor.name for tensor in stage.inputs] == [FRAME]:
                    stages.append(stage)
                continue
            if (output := self.output_of(stage, trunk)) is None:
                continue
            image = next(tensor for tensor in stage.inputs if tensor.name == trunk.image)
            first = first or image
            read = first if self.chained else image
            old = trunk.c5 if output.name not in {tensor.name for tensor in stage.outputs} else output.name
            self.trunks[name] = trunk
            self._graphs[stage_graph(name)] = cut_graph(graph, [old], {old: output.name, image.name: read.name})
            stages.append(StageSpec(name, (read,), (output,)))
        if not self.trunks:
            raise BackendError(f"no stage of {self.path.name} has a trunk that can be told from its weights' names")
        segment = SegmentSpec(tuple(stage.name for stage in stages), stages[-1].outputs[0].name)
        self.manifest = replace(self.manifest, stages=tuple(stages), segments=(segment,))

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, maps_weights: bool = True) -> PartBundle:
        """As `Bundle.open`, with the stages cut."""
        return cast("PartBundle", super().open(path, maps_weights=maps_weights))

    def __enter__(self) -> PartBundle:
        return self

    @abstractmethod
    def output_of(self, stage: StageSpec, trunk: Trunk) -> TensorSpec | None:
        """What is left of a stage puts this out; None: nothing is left of it."""

    def read(self, name: str) -> bytes:
        """As `Bundle.read`; the graphs are those that were cut."""
        return self._graphs[name] if name in self._graphs else super().read(name)


class TrunkBundle(PartBundle):
    """The bare trunks: from the image to c5, heads, attention and crop cut off."""

    def output_of(self, stage: StageSpec, trunk: Trunk) -> TensorSpec | None:
        """`c5_<stage>` [B, D5, h, w]: maps of all stages are as large as the heat maps."""
        heatmap = next(
            tensor
            for s in self.manifest.stages
            for tensor in s.outputs
            if tensor.name == self.manifest.views[0].heatmap
        )
        return TensorSpec(f"c5_{stage.name}", "float32", (BATCH, trunk.channels, *heatmap.shape[1:]))


class TrunkChainBundle(TrunkBundle):
    """The bare trunks behind `ingest`, as one segment: for backends that keep tensors on a device."""

    chained = True


class HeadBundle(PartBundle):
    """Trunk, part convolution and head of each expert, up to its logits; attention and crop cut off."""

    def output_of(self, stage: StageSpec, trunk: Trunk) -> TensorSpec | None:
        """The expert's logits; None for the gate, which has no attention to cut off."""
        del trunk
        logits = {view.logits for view in self.manifest.views}
        return next((tensor for tensor in stage.outputs if tensor.name in logits), None)
