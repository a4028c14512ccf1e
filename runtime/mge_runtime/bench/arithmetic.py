"""What the chain gets from the device: its arithmetic against the rate at which the device multiplies matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mge_runtime.backends.ort_layers import stage_layers
from mge_runtime.bench.device_operator import ONCE
from mge_runtime.bench.matrix_rate import open_rates
from mge_runtime.bench.parts import TrunkBundle, TrunkChainBundle
from mge_runtime.bench.stats import Ratio
from mge_runtime.bundle import Bundle
from mge_runtime.errors import BackendError

if TYPE_CHECKING:
    from pathlib import Path

    from mge_runtime.backends import Choice
    from mge_runtime.backends.ort_layers import Layer
    from mge_runtime.bench.matrix_rate import Rates
    from mge_runtime.bench.rounds import Series

__all__ = ["Arithmetic", "Work", "Yardstick", "measured_arithmetic", "open_yardstick"]

_FLOP = 2  # of a multiply-accumulate
_GIGA = 1e9


@dataclass(frozen=True)
class Work:
    """Convolutions and matrix products of some stages."""

    macs: int  # multiply-accumulates of one image
    weights: int  # elements, read once for a batch
    maps: int  # elements that these layers read and put out for one image

    @classmethod
    def of(cls, layers: Iterable[Layer]) -> Work:
        """Of all layers together."""
        found = list(layers)
        return cls(sum(x.macs for x in found), sum(x.weights for x in found), sum(x.maps for x in found))

    def flop(self, batch: int) -> float:
        """Floating-point operations of a batch."""
        return float(_FLOP * self.macs * batch)

    def elements(self, batch: int) -> int:
        """That a batch moves where no cache holds anything between two layers, and nothing is moved twice."""
        return self.weights + self.maps * batch


@dataclass(frozen=True)
class Arithmetic:
    """One batch size against the rates that were measured in the same rounds.

    TFLOP/s count two operations for each multiply-accumulate of convolutions and matrix products, and none for the
    rest. Trunks are those of the bench's contender "bare trunks".
    """

    dtype: str  # of the rates: "float32" or "float16"
    size: int  # rows and columns of the matrices
    chain_gmacs: float  # of one image
    trunks_gmacs: float | None  # of one image; None: no trunk can be told
    rate_tflops: Ratio  # of the matrix product; its interval and its rounds are TFLOP/s too
    memory_gb_s: Ratio  # of an operator that reads an array and writes one, GB/s
    tflops: tuple[Ratio, ...]  # of the chain, of the bare trunks
    shares: tuple[Ratio, ...]  # of the matrix rate, the same
    parts: tuple[Ratio, ...]  # of the chain's time; they add up to one in each round; empty without trunks
    traffic_mb: float | None  # of the trunks' layers, see `Work.elements`; None: without trunks, or INT8
    traffic_share: Ratio | None  # of the trunks' time that this takes at the measured memory rate
    limits: tuple[str, ...]  # what the numbers say of the limit, in words


def _work(bundle: Bundle) -> Work:
    return Work.of(layer for layers in stage_layers(bundle).values() for layer in layers)


@dataclass(frozen=True)
class Yardstick:
    """What the chain of a bundle is held to, for all batch sizes."""

    rates: Rates
    chain: Work
    trunks: Work | None  # None: no trunk can be told
    int8: bool  # whether stages compute in INT8, so that the rate is not that of their type


def open_yardstick(path: Path, choice: Choice, threads: int | None, seconds: float) -> Yardstick:
    """Count the bundle's arithmetic, and open what measures the rates; whoever calls closes `rates`.

    Args:
        path: the bundle.
        choice: what runs it.
        threads: as for `Pipeline.open`.
        seconds: to spend on finding the size of the product.

    Raises:
        BundleError: the bundle is damaged.
        BackendError: as for `stage_layers` and `open_rates`.
    """
    with Bundle.open(path) as bundle:
        chain, manifest = _work(bundle), bundle.manifest
    try:
        with (TrunkBundle if choice.device == "cpu" else TrunkChainBundle).open(path) as parts:
            trunks = _work(parts)
    except BackendError:  # which the rounds report
        trunks = None
    return Yardstick(open_rates(choice, manifest, threads, seconds), chain, trunks, manifest.is_int8)


def measured_arithmetic(
    yardstick: Yardstick,
    series: Mapping[str, Series],
    batch: int,
    chain_ms: Sequence[float],
    trunks_ms: Sequence[float] | None,
) -> Arithmetic:
    """Compare round by round.

    Args:
        yardstick: whose operators ran in the rounds.
        series: times by name, those of the operators among them.
        batch: images in a run.
        chain_ms: the median of each round.
        trunks_ms: the same of the bare trunks, one after the other; None: they were not run.
    """
    rates = yardstick.rates
    matrix, memory = series[rates.matrix.name], series[rates.memory.name]
    ran = [("chain", yardstick.chain, np.asarray(chain_ms))]
    if trunks_ms is not None and yardstick.trunks is not None:
        ran.append(("bare trunks", yardstick.trunks, np.asarray(trunks_ms)))
    product_ms, copy_ms = np.asarray(matrix.step_medians(ONCE)), np.asarray(memory.step_medians(ONCE))
    rate = rates.matrix_flop / product_ms  # FLOP / ms
    ideal_ms = [work.flop(batch) / rate for _, work, _ in ran]
    parts: tuple[Ratio, ...] = ()
    traffic_mb = traffic = None
    if len(ran) == 2:
        (_, _, whole), (_, work, bare) = ran
        behind = whole - bare - (ideal_ms[0] - ideal_ms[1])
        parts = (
            _ratio("arithmetic at the measured matrix rate", ideal_ms[0], whole),
            _ratio("trunks above their arithmetic (derived)", bare - ideal_ms[1], whole),
            _ratio("the rest above its arithmetic (derived)", behind, whole),
        )
        if not yardstick.int8:
            moved = work.elements(batch) * np.dtype(rates.dtype).itemsize
            traffic_mb = moved / 1e6
            traffic = _ratio("trunks' memory traffic / bare trunks", copy_ms * moved / rates.memory_bytes, bare)
    shares = tuple(_ratio(f"{ran[n][0]} / matrix rate", ideal_ms[n], ran[n][2]) for n in range(len(ran)))
    return Arithmetic(
        dtype=rates.dtype,
        size=rates.size,
        chain_gmacs=yardstick.chain.macs / _GIGA,
        trunks_gmacs=None if yardstick.trunks is None else yardstick.trunks.macs / _GIGA,
        rate_tflops=_ratio(f"matrix product of {rates.size} x {rates.size}, {rates.dtype}", rate, _GIGA),
        memory_gb_s=_ratio("memory, read and written", rates.memory_bytes / copy_ms, 1e6),
        tflops=tuple(_ratio(name, w.flop(batch) / ms, _GIGA) for name, w, ms in ran),
        shares=shares,
        parts=parts,
        traffic_mb=traffic_mb,
        traffic_share=traffic,
        limits=tuple(_limits(shares, parts, traffic, rates.dtype, int8=yardstick.int8)),
    )


def _limits(
    shares: Sequence[Ratio], parts: Sequence[Ratio], traffic: Ratio | None, dtype: str, *, int8: bool
) -> Iterator[str]:
    """What medians say, and no more."""
    if int8:
        yield f"the bundle computes in INT8 and the rate is that of {dtype}: a share may be above one"
    if not parts:
        yield "no bare trunks were run: what lies in them and what behind them cannot be told apart"
        return
    arithmetic, trunks, rest = (part.median for part in parts)
    if arithmetic >= 1 or max(trunks, rest) <= 0:
        yield "the chain is at the measured matrix rate or above it"
        return
    larger, lost = ("the trunks", trunks) if trunks >= rest else ("what lies beside the trunks", rest)
    yield f"most of the time above the arithmetic goes to {larger}: {lost:.0%} of the chain"
    if traffic is not None:
        above = 1 - shares[1].median
        if above <= 0:
            yield "the trunks are at the measured matrix rate or above it"
        elif traffic.median >= above:
            yield (
                f"their layers' memory traffic, if no cache held any, would take {traffic.median:.0%} of the trunks' "
                f"time, enough for the {above:.0%} above their arithmetic: memory may limit them"
            )
        else:
            yield (
                f"their layers' memory traffic, if no cache held any, would take {traffic.median:.0%} of the trunks' "
                f"time, less than the {above:.0%} above their arithmetic: memory's rate alone does not explain it"
            )


def _ratio(name: str, above: object, below: object) -> Ratio:
    """Of arrays over the rounds, or one number for all of them."""
    values = np.broadcast_arrays(np.asarray(above, np.float64), np.asarray(below, np.float64))
    return Ratio.of(name, *(array.tolist() for array in values))
