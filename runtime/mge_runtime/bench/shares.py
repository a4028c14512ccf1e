"""Where the chain's time goes, derived from the difference between a stage and its own graph cut down.

Nothing inside a session is timed: that would change what runs. A stage is timed in the chain, and twice more cut down,
in the same round: to its bare trunk, and to its logits. What lies between is a difference of two measured times, with
the noise of both.
"""

from __future__ import annotations

from mge_runtime.bench.rounds import Series
from mge_runtime.bench.stats import Ratio
from mge_runtime.manifest import FRAME, Manifest

__all__ = ["ATTENTION", "HEADS", "TRUNKS", "derived_shares"]

TRUNKS = "bare trunks (measured apart)"
HEADS = "heads and part convolutions (derived: stages cut to their logits, less bare trunks)"
ATTENTION = "attention + crop + ingest (derived: stages, less stages cut to their logits; ingest measured)"


def derived_shares(manifest: Manifest, chain: Series, trunks: Series, heads: Series) -> list[Ratio]:
    """Shares of the whole chain, round by round.

    Args:
        manifest: of the chain.
        chain: times of the stages.
        trunks: times of their bare trunks, by the same names.
        heads: times of the experts cut to their logits, by the same names; the gate is none of them.
    """
    cut = set(heads.steps[0][0])
    bare = set(trunks.steps[0][0])
    ingest = [stage.name for stage in manifest.stages if [tensor.name for tensor in stage.inputs] == [FRAME]]
    rounds = range(len(chain.rounds))

    def total(series: Series, names: set[str]) -> list[float]:
        medians = [series.step_medians(name) for name in sorted(names)]
        return [sum(values[number] for values in medians) for number in rounds]

    trunk = total(trunks, bare)
    answers = [a + b for a, b in zip(total(heads, cut), total(chain, bare - cut), strict=True)]
    stages = total(chain, bare)
    made = total(chain, set(ingest))
    whole = chain.medians
    return [
        Ratio.of(TRUNKS, trunk, whole),
        Ratio.of(HEADS, [a - t for a, t in zip(answers, trunk, strict=True)], whole),
        Ratio.of(ATTENTION, [s - a + i for s, a, i in zip(stages, answers, made, strict=True)], whole),
    ]
