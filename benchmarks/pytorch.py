"""PyTorch's ways of computing a checkpoint: as the method's authors run it, compiled, and this project's own model.

Timed is what is timed of the chain: frames in memory (uint8) to logits on the host. Each frame becomes a normalized
tensor by itself, as in the authors' loader, the batch is moved to the device and computed under `torch.no_grad`.

`AuthorsChain` follows what the authors' code does, not how ours does it better (Zhang et al., ICCV 2019;
github.com/lbzhang/MGE-CNN), up to rounding:

- Attention is autograd's. The upper part of the backbone runs a second time from c4, now with gradients, a hook on its
  features keeps d score / d c5, and `backward` goes on through all of it, weights included, since they are parameters.
- The part convolution has its padding of 1 and its ReLU before the maximum.
- The map is upsampled whole, and box, crop and resize are a Python loop over the images.
- All heads are computed, those that only training needs too; the gate comes last.

On CUDA (not run so far) each way is there twice: in FP32 with PyTorch's own settings for TF32, and under FP16 autocast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mge.data.folder import normalize
from mge.model import NORM_SCALE, Expert, GlobalHead, MGENet

AUTHORS = "PyTorch eager, the authors' way"
MODEL = "PyTorch eager, MGENet"  # attention in closed form, crops without a loop
COMPILED = "PyTorch, the authors' way with torch.compile"
Way = Callable[[], np.ndarray]  # computes the batch once: logits [B, C] of the whole chain, on the host
_VERSIONS = 256  # every half of a backbone, with and without gradients, is one of the same forward to torch.compile

# Relative range below which MGENet calls a map flat (mge.attention); the authors' code stops there at 0 / 0.
_FLAT = 1e-6


class Unavailable(RuntimeError):  # noqa: N818 - a state that is printed like a result
    """A way that does not work here; its text is the reason, in one line."""


def pytorch_ways(
    model: MGENet, frames: np.ndarray, threads: int, device: str
) -> Iterator[tuple[str, Way | Unavailable]]:
    """All ways by name, on one copy of the weights; compiling, which takes minutes, comes last.

    Args:
        model: in evaluation mode; it is moved to the device, its gradients are written.
        frames: uint8 [B, S, S, 3], the batch.
        threads: of PyTorch on the CPU.
        device: "cpu" or "cuda:N".
    """
    makers: dict[str, Callable[[], Callable[[Tensor], Any]]] = {
        AUTHORS: lambda: AuthorsChain(model),
        MODEL: lambda: model,
        # With fullgraph a network that cannot be compiled is an error, not silently eager. A compiled backward reuses
        # its buffers, so the graph is not retained: nothing reads it.
        COMPILED: lambda: AuthorsChain(
            model, lambda module: torch.compile(module, fullgraph=True, dynamic=False), retain_graph=False
        ),
    }
    for name, make in makers.items():
        for autocast in (False, True) if device != "cpu" else (False,):
            try:
                model.to(device)
                torch.backends.cudnn.benchmark = True  # as the authors
                way = _way(make(), model, frames, threads, device, autocast)
                with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=_VERSIONS):
                    warnings.simplefilter("ignore")
                    way()
                found: Way | Unavailable = way
            except Exception as error:  # the compilers' exceptions have no common base
                found = Unavailable((str(error).strip() or type(error).__name__).splitlines()[0])
            yield name + (" (FP16 autocast)" if autocast else ""), found


def _way(
    compute: Callable[[Tensor], Any], model: MGENet, frames: np.ndarray, threads: int, device: str, autocast: bool
) -> Way:
    @torch.no_grad()
    def way() -> np.ndarray:
        torch.set_num_threads(threads)  # per thread where PyTorch uses OpenMP: set where the work is done
        images = torch.stack([normalize(frame, model.config) for frame in frames]).to(device)
        with torch.autocast("cuda", torch.float16) if autocast else nullcontext():
            logits = compute(images).logits
        return logits.float().cpu().numpy()

    return way


class AuthorsOutput(NamedTuple):
    """What the authors' way says."""

    logits: Tensor  # [B, C], the mixture
    gate: Tensor  # [B, K], rows sum to 1
    boxes: list[list[list[Tensor]]]  # by crop, by image: x0, y0, x1, y1 in pixels of what the expert before saw


class AuthorsChain:
    """An `MGENet` computed as the authors' code does.

    Args:
        model: in evaluation mode, on the device it is to run on; its weights are shared, not copied.
        compile_module: wraps each network (the halves of the backbones, the heads); None: they run as they are.
        retain_graph: whether `backward` keeps the graph, as the authors' call asks for; nothing reads it afterwards.

    Raises:
        Unavailable: a backbone cannot be cut at c4.
    """

    def __init__(
        self,
        model: MGENet,
        compile_module: Callable[[nn.Module], Any] | None = None,
        *,
        retain_graph: bool = True,
    ) -> None:
        wrap = compile_module or (lambda module: module)
        self._model, self._retain_graph = model, retain_graph
        self._experts: list[_Networks] = []
        for k, expert in enumerate(model.experts):
            assert isinstance(expert, Expert)
            lower, upper = split_backbone(expert.backbone, model.config.image_size)
            upper = nn.Sequential(*upper, expert.norm5)
            heads = _Heads(expert).eval()
            self._experts.append(_Networks(wrap(lower), wrap(upper), wrap(heads), model.attention_head(k)))
        self._gate = None if model.gate is None else wrap(model.gate)

    def __call__(self, images: Tensor) -> AuthorsOutput:
        """Predict normalized images [B, 3, S, S]; call it under `torch.no_grad`, as the authors' test does."""
        config = self._model.config
        seen = images
        logits: list[Tensor] = []
        boxes: list[list[list[Tensor]]] = []
        for k, networks in enumerate(self._experts):
            c4 = networks.lower(seen)
            c5 = networks.upper(c4)
            logits.append(networks.heads(c4, c5)[-1])
            if k < config.experts - 1:
                weights = self._channel_weights(networks, c4)
                seen, found = _crop_each(seen, c5, weights, config.box_thresholds[k])
                boxes.append(found)
        gate = images.new_ones(images.shape[0], 1) if self._gate is None else self._gate(images)
        return AuthorsOutput((torch.stack(logits, -1) * gate[:, None]).sum(-1), gate, boxes)

    def _channel_weights(self, networks: _Networks, c4: Tensor) -> Tensor:
        """Grad-CAM's weights mean_hw(ReLU(d score_t / d c5)), [B, D], for the class t with the largest score."""
        gradients: list[Tensor] = []
        with torch.enable_grad():
            c5 = networks.upper(c4.detach().requires_grad_())
            c5.register_hook(gradients.append)
            scores = networks.attention(c5)
            one_hot = torch.zeros_like(scores)
            one_hot[torch.arange(len(scores)), scores.argmax(-1)] = 1
            self._model.zero_grad()  # backward adds to what it finds
            (one_hot * scores).sum().backward(retain_graph=self._retain_graph)
        return gradients[-1].relu().mean(-1).mean(-1)


class _Networks(NamedTuple):
    """One expert, maybe compiled."""

    lower: Any  # image [B, 3, S, S] -> c4 [B, D4, S/16, S/16]
    upper: Any  # c4 -> c5 [B, D5, S/32, S/32], normalized where the model does
    heads: Any  # c4, c5 -> three logits [B, C]; the last is the expert's prediction
    attention: GlobalHead  # the head whose scores are differentiated


class _Heads(nn.Module):
    """The three heads of one expert, with the padded part convolution."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.norm4, self.part_conv = expert.norm4, expert.part_conv
        self.global_head, self.part_head, self.concat_head = expert.global_head, expert.part_head, expert.concat_head

    def forward(self, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """C4 [B, D4, h, w] and c5 [B, D5, h/2, w/2] to global, part and concatenated logits, each [B, C]."""
        pooled = F.adaptive_avg_pool2d(c5, 1).flatten(1)
        response = F.conv2d(self.norm4(c4), self.part_conv.weight, self.part_conv.bias, padding=1)
        parts = F.adaptive_max_pool2d(response.relu(), 1).flatten(1)
        halves = [NORM_SCALE * F.normalize(pooled), NORM_SCALE * F.normalize(parts)]
        return self.global_head.fc(pooled), self.part_head(parts), self.concat_head(torch.cat(halves, 1))


def _crop_each(images: Tensor, c5: Tensor, weights: Tensor, threshold: float) -> tuple[Tensor, list[list[Tensor]]]:
    """Box, crop and resize, one image after the other.

    Args:
        images: [B, 3, S, S].
        c5: [B, D, h, w].
        weights: [B, D], of its channels.
        threshold: in [0, 1), of the normalized map.

    Returns:
        [B, 3, S, S] and each image's box.
    """
    size = images.shape[-1]
    cam = (c5.clone().flatten(2) * weights[:, :, None]).sum(1).view(len(c5), 1, *c5.shape[2:])
    cam = F.interpolate(cam, size=(size, size), mode="bilinear", align_corners=True).flatten(1)
    low, high = cam.min(-1, keepdim=True)[0], cam.max(-1, keepdim=True)[0]
    span = high - low
    flat = span <= _FLAT * torch.maximum(low.abs(), high.abs())
    cam = torch.where(flat, 0, cam - low) / torch.where(flat, 1, span)
    mask = torch.sign(torch.sign(cam - threshold) + 1).view(-1, size, size)
    crops = torch.zeros_like(images)
    boxes: list[list[Tensor]] = []
    for k in range(len(images)):
        kept = mask[k].nonzero()
        x0 = y0 = kept.new_zeros(())
        x1 = y1 = kept.new_full((), size)
        if len(kept):
            (top, left), (bottom, right) = kept.min(0)[0], kept.max(0)[0]
            if left != right and top != bottom:
                x0, y0, x1, y1 = left, top, right, bottom
        crop = images[k, :, y0:y1, x0:x1]
        crops[k] = F.interpolate(crop[None], size=(size, size), mode="bilinear", align_corners=True)[0]
        boxes.append([x0, y0, x1, y1])
    return crops, boxes


def split_backbone(backbone: nn.Module, size: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Cut a backbone into image -> c4 and c4 -> c5.

    timm's are a row of modules, or a row with one level of `Sequential` inside. That this one is, and where c4 lies in
    it, is found by running it: the halves hold the backbone's own modules and give bit for bit what it gives.

    Args:
        backbone: in evaluation mode, image [B, 3, S, S] -> c4 and c5.
        size: pixels, S.

    Raises:
        Unavailable: the backbone is more than a row of modules.
    """
    modules: list[nn.Module] = []
    for child in backbone.children():
        modules += list(child) if isinstance(child, nn.Sequential) else [child]
    device = next(backbone.parameters()).device
    image = torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    with torch.no_grad():
        c4, c5 = backbone(image)
        try:
            cut = _first_equal(modules, image, c4)
            end = cut + _first_equal(modules[cut:], c4, c5)
        except (RuntimeError, TypeError, LookupError) as error:
            raise Unavailable(
                f"{type(backbone).__name__} cannot be cut at c4, which Grad-CAM the authors' way needs; "
                "expected a backbone that is a row of modules"
            ) from error
    return nn.Sequential(*modules[:cut]), nn.Sequential(*modules[cut:end])


def _first_equal(modules: list[nn.Module], value: Tensor, wanted: Tensor) -> int:
    """How many modules, run one after the other, lead from a value to the wanted one."""
    # Activations may work in place, and the value is needed again.
    value = value.clone()
    for count, module in enumerate(modules, 1):
        value = module(value)
        if torch.equal(value, wanted):
            return count
    raise LookupError
