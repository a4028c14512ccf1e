"""The method as its paper and published description state it: one image at a time, by loops, slices and autograd.

Nothing here calls mge's own attention, heads or mixture; only the backbones and the weights are shared.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass
class Expected:
    """One image."""

    images: list = field(default_factory=list)  # [3, S, S], what each expert saw
    global_logits: list = field(default_factory=list)  # [C] of each expert
    part_logits: list = field(default_factory=list)
    logits: list = field(default_factory=list)
    heatmaps: list = field(default_factory=list)  # [h, w]
    boxes: list = field(default_factory=list)  # (x0, y0, x1, y1) of each crop
    gate: torch.Tensor | None = None  # [K]
    mixture: torch.Tensor | None = None  # [C]


def box_of(cam, size, threshold):
    """The slice that the next expert sees, as x0, y0, x1, y1."""
    if cam.min() == cam.max():  # upsampled, a flat map would have a range of rounding errors
        return 0, 0, size, size
    upsampled = F.interpolate(cam[None, None], (size, size), mode="bilinear", align_corners=True)[0, 0]
    low, high = upsampled.min(), upsampled.max()
    kept = ((upsampled - low) / (high - low) >= threshold).nonzero().tolist()
    rows, columns = [row for row, _ in kept], [column for _, column in kept]
    if min(rows) == max(rows) or min(columns) == max(columns):
        return 0, 0, size, size
    return min(columns), min(rows), max(columns), max(rows)


def crop_of(image, box, size):
    """Slice and resize one image [3, S, S]."""
    x0, y0, x1, y1 = box
    piece = image[:, y0:y1, x0:x1]
    return F.interpolate(piece[None], (size, size), mode="bilinear", align_corners=True)[0]


def run(model, images, labels=None):
    """Predict normalized images [B, 3, S, S]; a list of `Expected`."""
    return [run_one(model, image, None if labels is None else int(labels[i])) for i, image in enumerate(images)]


def run_one(model, image, label=None):
    config = model.config
    expected = Expected()
    seen = image
    for k, expert in enumerate(model.experts):
        expected.images.append(seen)
        with torch.no_grad():
            c4, c5 = expert.backbone(seen[None])
            pooled = torch.stack([channel.mean() for channel in c5[0]])
            parts = F.conv2d(c4, expert.part_conv.weight, expert.part_conv.bias, padding=1).relu().amax((2, 3))[0]
            halves = [10 * vector / vector.norm() for vector in (pooled, parts)]
            expected.global_logits.append(expert.global_head.fc(pooled))
            expected.part_logits.append(expert.part_head(parts))
            expected.logits.append(expert.concat_head(torch.cat(halves)))
        heatmap = attention_of(model, k, c5, label)
        expected.heatmaps.append(heatmap)
        if k + 1 < config.experts:
            box = box_of(heatmap, config.image_size, config.box_thresholds[k])
            expected.boxes.append(box)
            seen = crop_of(seen, box, config.image_size)
    with torch.no_grad():
        c5 = model.gate.backbone(image[None])[-1]
        scores = model.gate.output(model.gate.hidden(c5[0].mean((1, 2))))
    exponentials = torch.exp(scores - scores.max())
    expected.gate = exponentials / exponentials.sum()
    expected.mixture = sum(weight * logits for weight, logits in zip(expected.gate, expected.logits, strict=True))
    return expected


def attention_of(model, k, c5, label):
    """Grad-CAM of one image by autograd, [h, w]."""
    whose = k if model.config.attention_head == "own" else 0
    fc = model.experts[whose].global_head.fc
    features = c5.detach().requires_grad_(True)
    scores = F.linear(features.mean((2, 3)), fc.weight, fc.bias)[0]
    target = int(scores.argmax()) if label is None else label
    (gradient,) = torch.autograd.grad(scores[target], features)
    cam = torch.zeros(c5.shape[2:])
    for channel, slope in zip(c5[0], gradient[0], strict=True):
        cam += slope.clamp(min=0).mean() * channel
    return cam.detach()
