"""Gathers of elements that take whole lines."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from mge.attention import crop_resize
from mge_export.graph import OPSET
from mge_export.lines import gather_lines


class Lines(torch.nn.Module):
    """Take lines of a map [B, L, a, b] by an index [B, S, 1]."""

    def __init__(self, axis=1, spread=(3,), short=0):
        super().__init__()
        self.axis, self.spread, self.short = axis, spread, short

    def forward(self, lines, index):
        for axis in self.spread:
            index = index.unsqueeze(axis)
        shape = [*index.shape[:2], *lines.shape[2:]]
        shape[-1] -= self.short
        return lines.gather(self.axis, index.expand(shape))


def exported(module, *inputs):
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        module,
        inputs,
        dynamo=True,
        opset_version=OPSET,
        input_names=[f"x{n}" for n in range(len(inputs))],
        output_names=["y"],
        dynamic_shapes=tuple({0: batch} for _ in inputs),
        verbose=False,
    )
    return program.model_proto


def answer(model, *inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {f"x{n}": value.numpy() for n, value in enumerate(inputs)})[0]


def kinds(model):
    return {node.op_type for node in model.graph.node}


def example(batch, lines=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, lines, 3, 4, generator=generator), torch.randint(5, (batch, 7, 1), generator=generator)


@pytest.mark.filterwarnings("ignore")  # of the exporter about itself
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_lines_are_copied_by_one_index_each(batch):
    model = exported(Lines(), *example(2))
    assert gather_lines(model) == 1
    assert kinds(model) == {"GatherND"}
    onnx.checker.check_model(model)
    lines, index = example(batch)
    np.testing.assert_array_equal(answer(model, lines, index), Lines()(lines, index).numpy())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "module",
    [Lines(axis=2, spread=(3,)), Lines(short=1), Lines(spread=(2,))],
    ids=["along another axis", "a part of each line", "spread otherwise"],
)
def test_other_gathers_stay(module):
    lines, index = example(2, lines=8)
    index = index % 3
    model = exported(module, lines, index)
    before = model.SerializeToString()
    assert gather_lines(model) == 0
    assert model.SerializeToString() == before


class Crop(torch.nn.Module):
    def forward(self, image, box):
        return crop_resize(image, box, 24)


@pytest.mark.filterwarnings("ignore")
def test_the_crop_copies_lines_alone():
    boxes = torch.tensor([[0.0, 0, 24, 24], [3, 5, 9, 23], [23, 0, 24, 1], [5, 7, 6, 8]])
    images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    model = exported(Crop(), images, boxes)
    assert gather_lines(model) == 4
    assert not {"GatherElements", "Expand", "Shape", "Range"} & kinds(model), "nothing is computed from the batch size"
    np.testing.assert_allclose(answer(model, images, boxes), Crop()(images, boxes).numpy(), rtol=0, atol=1e-6)
