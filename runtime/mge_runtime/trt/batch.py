"""Batch sizes that an engine is built for."""

from __future__ import annotations

from dataclasses import dataclass

from mge_runtime.errors import BackendError

__all__ = ["LARGEST", "BatchRange"]

LARGEST = 1024  # a frame batch of this size is 600 MB at 448 pixels; more is a typing error


@dataclass(frozen=True)
class BatchRange:
    """An optimisation profile: every batch from `least` to `most` runs, `usual` runs best."""

    least: int = 1
    usual: int = 1
    most: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.usual <= self.most <= LARGEST:
            raise BackendError(
                f"the batch range is {self}; expected MIN <= OPT <= MAX between 1 and {LARGEST}, such as 1,1,8"
            )

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """Read "MIN,OPT,MAX", "MIN,MAX" (the least is the usual one) or "N" (this batch size alone).

        Raises:
            BackendError: it is none of these.
        """
        parts = text.split(",")
        # Python reads no number of more than 4300 digits, and nobody a line with one.
        if not 1 <= len(parts) <= 3 or not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
            raise BackendError(f"the batch range is {text[:40]!r}; expected MIN,OPT,MAX, such as 1,1,8")
        numbers = [int(part) for part in parts]
        return cls(numbers[0], numbers[len(numbers) // 2] if len(numbers) == 3 else numbers[0], numbers[-1])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(least, usual, most)."""
        return self.least, self.usual, self.most

    def __str__(self) -> str:
        """For example "1,1,8"."""
        return ",".join(map(str, self.sizes))
