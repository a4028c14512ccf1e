"""The prediction for one image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


NONE_OF_THESE = "none of these"  # what people read instead of a class that was rejected
TOP = 5  # classes in `Prediction.top`


class TopClass(NamedTuple):
    """One of the likeliest classes."""

    name: str
    probability: float  # in [0, 1]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the chain says of one image and how it came about. K counts the experts that ran, C the classes."""

    logits: NDArray[np.float32] = field(repr=False)  # [C], finite
    class_names: tuple[str, ...] = field(repr=False)  # of the model, by class index
    expert_logits: NDArray[np.float32] = field(repr=False)  # [K, C], each expert alone
    gate: NDArray[np.float32] | None  # [K], share of each expert, sums to 1; None where the gate did not run
    boxes: NDArray[np.float32]  # [K, 4] (x0, y0, x1, y1), what each expert saw, in pixels of the source image
    # K of [h, w], each expert's attention over what it saw.
    heatmaps: tuple[NDArray[np.float32], ...] = field(repr=False)
    width: int  # pixels of the source image, upright
    height: int  # pixels of the source image
    # Milliseconds for this image: "decode", "preprocess", each graph (a batch's time divided by its size), and "total",
    # their sum; where decoding overlaps computing the wall time is less.
    timings_ms: Mapping[str, float]
    # Of the logits, > 0, as it was learned; None: it was not, and probabilities are the model's own, as they are.
    temperature: float | None = None
    # What `mge-calibrate` learned thresholds for; None: it did not.
    rejected: bool | None = None  # whether the image looks like none of the classes
    # The classes, likeliest first, among which the class is with the share that was asked for; at least one.
    set: tuple[str, ...] | None = None
    # The class, or what lies above it, where that is confident enough; None, too, where not even a root is.
    coarse: TopClass | None = None

    @cached_property
    def top(self) -> tuple[TopClass, ...]:
        """The five likeliest classes (all, where there are fewer), likeliest first."""
        return self.top_k(TOP)

    @property
    def class_index(self) -> int:
        """Of the likeliest class."""
        return int(self.logits.argmax())

    @property
    def class_name(self) -> str:
        """Of the likeliest class."""
        return self.class_names[self.class_index]

    @property
    def probability(self) -> float:
        """Of the likeliest class, in [0, 1]: softmax of `logits` / `temperature`."""
        return self.top[0].probability

    @property
    def calibrated(self) -> bool:
        """Whether the temperature was learned."""
        return self.temperature is not None

    @property
    def experts_used(self) -> int:
        """How many experts ran, K."""
        return len(self.expert_logits)

    def top_k(self, k: int) -> tuple[TopClass, ...]:
        """The `k` likeliest classes (all, where there are fewer), likeliest first; ties by class index."""
        return _likeliest(self.logits, self.class_names, k, self.temperature or 1.0)

    def notes(self) -> list[str]:
        """What was learned to be said beside the class, for people, a line each; nothing of a plain prediction."""
        lines = [NONE_OF_THESE] if self.rejected else []
        if self.coarse is not None and self.coarse.name != self.class_name:
            lines.append(f"{self.coarse.name} {self.coarse.probability:.1%}")
        if self.set is not None and len(self.set) > 1:
            lines.append(f"one of {len(self.set)}: {', '.join(self.set[:TOP])}{', ...' if len(self.set) > TOP else ''}")
        return lines

    def to_dict(self, *, top_k: int = TOP) -> dict[str, Any]:
        """Plain values for JSON: everything but logits and heat maps, numbers rounded for reading.

        "calibrated" is about these probabilities; those of single experts are the model's own.
        """
        return {
            "class_index": self.class_index,
            "class_name": self.class_name,
            "probability": round(self.probability, 6),
            "calibrated": self.calibrated,
            "rejected": self.rejected,
            "set": None if self.set is None else list(self.set),
            "coarse": None if self.coarse is None else _plain(self.coarse),
            "top": [_plain(likely) for likely in self.top_k(top_k)],
            "experts_used": self.experts_used,
            "experts": [self._expert(k) for k in range(self.experts_used)],
            "gate": None if self.gate is None else [round(float(share), 6) for share in self.gate],
            "boxes": [[round(float(edge), 2) for edge in box] for box in self.boxes],
            "width": self.width,
            "height": self.height,
            "timings_ms": {name: round(value, 3) for name, value in self.timings_ms.items()},
        }

    def _expert(self, k: int) -> dict[str, Any]:
        return _plain(_likeliest(self.expert_logits[k], self.class_names, 1)[0])


def _plain(likely: TopClass) -> dict[str, Any]:
    return {"class_name": likely.name, "probability": round(likely.probability, 6)}


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities of logits along the last axis, in double precision."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _likeliest(
    logits: NDArray[Any], class_names: tuple[str, ...], k: int, temperature: float = 1.0
) -> tuple[TopClass, ...]:
    probabilities = softmax(logits.astype(np.float64) / temperature)
    order = np.argsort(-probabilities, kind="stable")[:k]
    return tuple(TopClass(class_names[i], float(probabilities[i])) for i in order.tolist())
