"""Read JSON with types checked: every error names the path of the field, as `manifest.json: graphs[2].name`.

A document may come from anybody, so everything is bounded before it is used: its size and depth, numbers, lengths of
texts and the characters in them, which may reach a terminal.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn, TypeAlias, TypeVar

from mge_runtime.errors import BundleError

__all__ = ["LARGEST", "Field", "JsonValue", "parse_json"]

# Read-only types, so that a dict of dicts or of lists of numbers is one of them to a type checker.
JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"

_T = TypeVar("_T")
LARGEST = 1 << 22  # bytes of a document; the manifest of 20,000 classes has 1 MB
_DEEPEST = 32  # lists and objects inside each other; what mge writes has 8
_DIGITS = 20  # of a whole number; those of 64 bits have as many
_LONGEST = 1000  # characters of a text
_CONTROLS = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories
_SHOWN = 60  # characters of a wrong value that a message shows
_ADVICE = "the bundle is damaged or foreign, export it again"


class Field:
    """One JSON value with the path that leads to it.

    Raises (every reader):
        BundleError: the value is of another type or out of range.
    """

    def __init__(self, value: JsonValue, path: str, document: str, advice: str = _ADVICE) -> None:
        self._value = value
        self._path = path
        self._document = document
        self._advice = advice  # what to do about a value that is refused

    @property
    def value(self) -> JsonValue:
        """The value as it is, for parts of the document that are free JSON."""
        return self._value

    def fail(self, expected: str) -> NoReturn:
        """Refuse this value."""
        found = json.dumps(self._value, ensure_ascii=not _is_clean(str(self._value)))
        found = found if len(found) <= _SHOWN else found[: _SHOWN - 3] + "..."
        path = self._path if len(self._path) <= _LONGEST and _is_clean(self._path) else ascii(self._path[:_SHOWN])
        where = f"{self._document}: {path}" if path else self._document
        raise BundleError(f"{where} is {found}; expected {expected}: {self._advice}")

    def text(self, most: int = _LONGEST) -> str:
        """A string of 1 to `most` characters, none of which controls a terminal."""
        if not isinstance(self._value, str) or not self._value:
            self.fail("a text")
        if len(self._value) > most or not _is_clean(self._value):
            self.fail(f"a text of at most {most} characters, without control characters")
        return self._value

    def integer(self, low: int = 0, high: int = 2**53) -> int:
        """A whole number from `low` to `high`."""
        if not isinstance(self._value, int) or isinstance(self._value, bool) or not low <= self._value <= high:
            self.fail(f"a whole number of at least {low}" if high == 2**53 else f"a whole number from {low} to {high}")
        return self._value

    def number(self, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number from `low` to `high`."""
        if not isinstance(self._value, (int, float)) or isinstance(self._value, bool) or not math.isfinite(self._value):
            self.fail("a finite number")
        if not low <= self._value <= high:
            self.fail(f"a number from {low:g} to {high:g}")
        return float(self._value)

    def sha256(self) -> str:
        """64 hexadecimal digits."""
        text = self.text()
        if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
            self.fail("the 64 hexadecimal digits of a SHA-256")
        return text

    def crc32(self) -> str:
        """8 hexadecimal digits."""
        text = self.text()
        if len(text) != 8 or not set(text) <= set("0123456789abcdef"):
            self.fail("the 8 hexadecimal digits of a CRC-32")
        return text

    def items(self) -> list[Field]:
        """The elements of a list."""
        if not isinstance(self._value, list):
            self.fail("a list")
        return [Field(v, f"{self._path}[{i}]", self._document, self._advice) for i, v in enumerate(self._value)]

    def table(self) -> dict[str, Field]:
        """The members of an object with free names."""
        if not isinstance(self._value, dict):
            self.fail("an object")
        return {key: self._child(key, value) for key, value in self._value.items()}

    def members(self, names: Collection[str]) -> dict[str, Field]:
        """The members of an object with exactly these names."""
        table = self.table()
        for name in names:
            if name not in table:
                self._child(name, None).fail("this field, which is missing")
        for name, field in table.items():
            if name not in names:
                field.fail("no field of this name")
        return table

    def optional(self, read: Callable[[Field], _T]) -> _T | None:
        """What `read` makes of the value; None where it is null."""
        return None if self._value is None else read(self)

    def _child(self, name: str, value: JsonValue) -> Field:
        return Field(value, f"{self._path}.{name}" if self._path else name, self._document, self._advice)


def parse_json(data: bytes, document: str, advice: str = _ADVICE) -> Field:
    """Parse UTF-8 JSON.

    Args:
        data: the bytes of the document.
        document: what to call it in messages.
        advice: what to do about a document that is refused.

    Raises:
        BundleError: not UTF-8, not JSON, too large or too deep, with numbers that are none (NaN, 1e999) or have too
            many digits, with a name twice in one object, or with text that is none (half of a surrogate pair).
    """
    if len(data) > LARGEST:
        raise BundleError(f"{document} has {len(data)} bytes; expected at most {LARGEST}: {advice}")
    try:
        value = json.loads(
            data.decode(),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_short,
            object_pairs_hook=_unique,
        )
        _check_tree(value, 0)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BundleError(f"{document} is no JSON ({error}); expected UTF-8 JSON: {advice}") from error
    return Field(value, "", document, advice)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_DIGITS]} is beyond every number")
    return value


def _short(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _unique(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    table = dict(pairs)
    if len(table) != len(pairs):  # tools differ in which of the two counts
        raise ValueError("an object has two members of the same name")
    return table


def _check_tree(value: JsonValue, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError is a ValueError
    elif isinstance(value, Mapping):
        for name, member in value.items():
            name.encode()
            _check_tree(member, depth + 1)
    elif isinstance(value, Sequence):
        for member in value:
            _check_tree(member, depth + 1)


def _is_clean(text: str) -> bool:
    """Whether a text has no characters that control a terminal or end a line (and none that are no text at all)."""
    return text.isprintable() or not any(unicodedata.category(c) in _CONTROLS for c in text)
