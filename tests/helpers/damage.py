"""Damaged files, as Hypothesis draws them: the same ones each time, as many as MGE_FUZZ_EXAMPLES says."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def fuzz(examples: int) -> settings:
    """Settings of a test of so many examples, of 250 where the environment asks for no other number."""
    return settings(
        max_examples=int(os.environ.get("MGE_FUZZ_EXAMPLES", "250")) * examples // 250,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def mutated(draw, kinds, seed_file):
    """Change, cut out, repeat or insert a few bytes of the file of one kind, half of the time where headers are."""
    kind = draw(st.sampled_from(sorted(kinds)))
    data = bytearray(seed_file(kind))
    for _ in range(draw(st.integers(1, 4))):
        end = max(len(data) - 1, 0)
        at = draw(st.integers(0, min(end, 64)) | st.integers(0, end))
        length = draw(st.integers(0, 8) | st.integers(0, len(data)))
        new = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"]))
        change = draw(st.sampled_from(["set", "cut", "end", "repeat", "insert"]))
        if change == "set":
            data[at : at + len(new)] = new
        elif change == "cut":
            del data[at : at + length]
        elif change == "end":
            del data[at:]
        else:
            data[at:at] = new if change == "insert" else data[at : at + length]
    return kind, bytes(data)
