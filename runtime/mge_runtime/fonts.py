"""Fonts that draw class names: Pillow's own, or one of the system's where that lacks characters."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont


_FOLDERS = (
    Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share", "fonts"),
    *map(Path, ("~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts")),
    *map(Path, ("~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts", "C:/Windows/Fonts")),
)
_STYLES = ("bold", "italic", "oblique", "light", "thin", "black", "condensed", "mono", "serif", "math")
_NOWHERE = "\U0010ffff"  # no character: fonts draw for it what they draw for those that they lack
_PROBE = 20  # pixels


def font_for(text: str, size: int) -> FreeTypeFont | ImageFont:
    """The font to draw a text with, `size` in pixels: of those that are here the first that has the most of it."""
    return _load(_best(frozenset(text)), size)


def undrawable(texts: Iterable[str]) -> str | None:
    """Say which characters are drawn as boxes and what to install; None where every one is drawn."""
    lacking = sorted({character for text in texts for character in _lacking(_best(frozenset(text)), frozenset(text))})
    if not lacking:
        return None
    others = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
    return (
        f"no font here draws {' '.join(lacking[:8])}{others}, so drawn images show boxes for them in class names; "
        "install one, such as the packages fonts-noto-core and fonts-noto-cjk of Debian and Ubuntu"
    )


@cache
def _load(path: Path | None, size: int) -> FreeTypeFont | ImageFont:
    """A font; None: Pillow's own, which has little beyond ASCII.

    Raises:
        OSError: it cannot be read.
    """
    from PIL import ImageFont

    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@cache
def _best(characters: frozenset[str]) -> Path | None:
    best, fewest = None, len(_lacking(None, characters))
    for path in _installed() if fewest else ():
        if (count := len(_lacking(path, characters))) < fewest:
            best, fewest = path, count
        if not fewest:
            break
    return best


def _lacking(path: Path | None, characters: frozenset[str]) -> set[str]:
    """The characters that a font has no glyph for; all of them where it cannot be read."""
    return {character for character in characters if not _has(path, character)}


@cache
def _has(path: Path | None, character: str) -> bool:
    if character.isspace() or unicodedata.category(character) == "Cf" or (path is None and character.isascii()):
        return True
    try:
        return _pixels(path, character) != _pixels(path, _NOWHERE)
    except (OSError, ValueError):  # damaged, or of bitmaps in other sizes
        return False


def _pixels(path: Path | None, character: str) -> bytes:
    from PIL import Image, ImageDraw

    image = Image.new("L", (3 * _PROBE, 2 * _PROBE))
    ImageDraw.Draw(image).text((4, 4), character, fill=255, font=_load(path, _PROBE))
    return image.tobytes()


@cache
def _installed() -> tuple[Path, ...]:
    """The font files of the usual folders, plain sans serif ones first."""
    found: list[Path] = []
    for folder in _FOLDERS:
        with suppress(RuntimeError, OSError):  # a user without a home, a folder that is closed
            found.extend(
                path
                for path in folder.expanduser().rglob("*")
                if path.suffix.lower() in (".ttf", ".otf", ".ttc") and "lastresort" not in path.name.lower()
            )
    return tuple(sorted(found, key=lambda path: (sum(style in path.name.lower() for style in _STYLES), path.name)))
