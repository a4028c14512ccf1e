"""The species of the field guide: what makes a bird one class and not another.

A species is a hood, an eye ring and a beak, and nothing else. Everything that decides lies on the head; whatever else a
picture shows is drawn from the same ranges for every species.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

__all__ = ["MAX_SPECIES", "MIN_SPECIES", "Colour", "Species", "list_species"]

Colour = tuple[int, int, int]  # RGB, 0..255

# The names become folder names.
_HOODS: tuple[tuple[str, Colour], ...] = (
    ("black", (26, 24, 28)),
    ("rufous", (186, 68, 28)),
    ("golden", (240, 196, 40)),
    ("azure", (44, 112, 206)),
)
_RINGS: tuple[tuple[str, Colour | None], ...] = (
    ("plain", None),
    ("white", (255, 255, 250)),
    ("scarlet", (226, 32, 40)),
)
_BEAKS: tuple[str, ...] = ("warbler", "finch", "creeper")

MIN_SPECIES = 2
MAX_SPECIES = len(_HOODS) * len(_RINGS) * len(_BEAKS)


@dataclass(frozen=True)
class Species:
    """One class of the field guide."""

    name: str  # the class's folder: lower-case words joined by "-"
    hood: Colour  # the plumage of the head
    ring: Colour | None  # the ring around the eye; None: no ring
    beak: str  # the beak's shape: "warbler" (thin), "finch" (cone) or "creeper" (long, bent down)


@lru_cache
def list_species(count: int) -> tuple[Species, ...]:
    """Return the first `count` species of the guide, sorted by name as an image folder numbers its classes.

    The first twelve are warblers, every hood with every ring: look-alikes in threes that differ in the eye ring alone
    and in fours that differ in the hood alone. The next twelve are finches, the last twelve creepers.

    Raises:
        ValueError: `count` lies outside MIN_SPECIES..MAX_SPECIES.
    """
    if not MIN_SPECIES <= count <= MAX_SPECIES:
        raise ValueError(f"found {count} species, expected {MIN_SPECIES} to {MAX_SPECIES}")
    every = [
        Species(f"{hood}-hooded-{ring}-eyed-{beak}", hood_colour, ring_colour, beak)
        for beak in _BEAKS
        for hood, hood_colour in _HOODS
        for ring, ring_colour in _RINGS
    ]
    return tuple(sorted(every[:count], key=lambda one: one.name))
