"""A classification head as one forward graph that also yields its own gradient.

Grad-CAM asks for `d score_t / d features` at test time, but neither ONNX nor TensorRT differentiates. A head that
states its gradient exports as it is. Of any other `DualHead` traces the scores *and* their gradient once into plain
ATen operators; what comes out exports like any other module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from mge.attention import StatesGradient, class_gradient, differentiate
from mge_runtime.errors import ExportError, TrainingError, brief


class DualHead(nn.Module):
    """Scores and `d score_t / d features` of a head in one forward pass; t has the highest score.

    Args:
        head: maps features [B, D, h, w] to class scores [B, C], and states its gradient or is differentiable, whatever
            it computes (normalization, hidden layers, ReLU); put into evaluation mode.
        features: an example [*, D, h, w]; only its shape without the batch, its type and its device count.

    Raises:
        ExportError: the head gives no [B, C], its operators have no derivative, or autograd gives zeros.
    """

    def __init__(self, head: nn.Module, features: Tensor) -> None:
        super().__init__()
        self.head = head.eval()
        self._names = tuple(name for name, _ in _state(head))
        self.graph = None if isinstance(head, StatesGradient) else _trace(head, self._names, features)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [B, C] and the gradient of the highest, [B, D, h, w] or [B, D, 1, 1] as the head states it."""
        if self.graph is None:
            return class_gradient(self.head, features)
        scores, gradient = self.graph(*(tensor for _, tensor in _state(self.head)), features)
        return scores, gradient


def _state(head: nn.Module) -> list[tuple[str, Tensor]]:
    """List parameters and buffers in a fixed order; the buffers because BatchNorm's statistics belong to the head."""
    return [*head.named_parameters(), *head.named_buffers()]


def _trace(head: nn.Module, names: tuple[str, ...], features: Tensor) -> fx.GraphModule:
    tensors = [tensor.detach() for _, tensor in _state(head)]
    # Any batch above 1: lengths 0 and 1 are taken for constants.
    example = features.new_zeros(2, *features.shape[1:])

    def scores_and_gradient(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        state = dict(zip(names, arguments[:-1], strict=True))

        def scores_of(value: Tensor) -> Tensor:
            return cast(Tensor, functional_call(head, state, (value,)))

        return differentiate(scores_of, arguments[-1])

    try:
        class_gradient(head, torch.linspace(-1, 1, example.numel()).to(example).view_as(example))  # refuses zeros
        traced = cast(Callable[..., fx.GraphModule], make_fx(scores_and_gradient, tracing_mode="symbolic"))(
            *tensors, example
        )
    except (RuntimeError, NotImplementedError, ValueError, IndexError, TrainingError) as error:
        raise ExportError(
            f"cannot trace the gradient of {type(head).__name__}: {brief(error)}; "
            "expected a differentiable head from features [B, D, h, w] to scores [B, C]"
        ) from error
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced
