"""JSON documents, written and read: types are checked, errors name the field, as `manifest.json: graphs[2].name`.

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
        self.value = value  # as it is, for parts of the document that are free JSON
        self._path = path
        self._document = document
        self._advice = advice  # what to do about a value that is refused

    def fail(self, expected: str) -> NoReturn:
        """Refuse this value."""
        found = json.dumps(self.value, ensure_ascii=not _is_clean(str(self.value)))
        found = found if len(found) <= _SHOWN else found[: _SHOWN - 3] + "..."
        path = self._path if len(self._path) <= _LONGEST and _is_clean(self._path) else ascii(self._path[:_SHOWN])
        where = f"{self._document}: {path}" if path else self._document
        raise BundleError(f"{where} is {found}; expected {expected}: {self._advice}")

    def text(self, most: int = _LONGEST) -> str:
        """A string of 1 to `most` characters, none of which controls a terminal."""
        if not isinstance(self.value, str) or not self.value:
            self.fail("a text")
        if len(self.value) > most or not _is_clean(self.value):
            self.fail(f"a text of at most {most} characters, without control characters")
        return self.value

    def integer(self, low: int = 0, high: int = 2**53) -> int:
        """A whole number from `low` to `high`."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not low <= self.value <= high:
            self.fail(f"a whole number of at least {low}" if high == 2**53 else f"a whole number from {low} to {high}")
        return self.value

    def number(self, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number from `low` to `high`."""
        if not isinstance(self.value, (int, float)) or isinstance(self.value, bool) or not math.isfinite(self.value):
            self.fail("a finite number")
        if not low <= self.value <= high:
            self.fail(f"a number from {low:g} to {high:g}")
        return float(self.value)

    def hexadecimal(self, digits: int = 64) -> str:
        """That many lower-case hexadecimal digits; 64 has a SHA-256."""
        text = self.text()
        if len(text) != digits or not set(text) <= set("0123456789abcdef"):
            self.fail(f"{digits} hexadecimal digits")
        return text

    def items(self) -> list[Field]:
        """The elements of a list."""
        if not isinstance(self.value, list):
            self.fail("a list")
        return [Field(v, f"{self._path}[{i}]", self._document, self._advice) for i, v in enumerate(self.value)]

    def table(self) -> dict[str, Field]:
        """The members of an object with free names."""
        if not isinstance(self.value, dict):
            self.fail("an object")
        return {key: self._child(key, value) for key, value in self.value.items()}

    def free(self) -> dict[str, JsonValue]:
        """An object whose members are free JSON."""
        return {key: field.value for key, field in self.table().items()}

    def members(self, names: Collection[str]) -> dict[str, Field]:
        """The members of an object with exactly these names."""
        table = self.table()
        if missing := [name for name in names if name not in table]:
            self._child(missing[0], None).fail("this field, which is missing")
        if unknown := [name for name in table if name not in names]:
            table[unknown[0]].fail("no field of this name")
        return table

    def optional(self, read: Callable[[Field], _T]) -> _T | None:
        """What `read` makes of the value; None where it is null."""
        return None if self.value is None else read(self)

    def _child(self, name: str, value: JsonValue) -> Field:
        return Field(value, f"{self._path}.{name}" if self._path else name, self._document, self._advice)


def dump_json(values: Mapping[str, object]) -> bytes:
    """UTF-8 JSON, the same for equal values."""
    return (json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


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
            data.decode(), parse_constant=_number, parse_float=_number, parse_int=_number, object_pairs_hook=_unique
        )
        _check_tree(value, 0)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BundleError(f"{document} is no JSON ({error}); expected UTF-8 JSON: {advice}") from error
    return Field(value, "", document, advice)


def _number(text: str) -> int | float:
    digits = text.lstrip("-")
    if digits.isdecimal():
        if len(digits) > _DIGITS:
            raise ValueError(f"a number has {len(digits)} digits")
        return int(text)
    if not math.isfinite(value := float(text)):  # NaN and Infinity are no JSON either
        raise ValueError(f"{text[:_DIGITS]} is beyond every number")
    return value


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
