"""Read JSON with types checked: every error names the path of the field, as `manifest.json: stages[2].name`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn, TypeAlias, TypeVar

from mge_runtime.errors import BundleError

__all__ = ["Field", "JsonValue", "parse_json"]

# Read-only types, so that a dict of dicts or of lists of numbers is one of them to a type checker.
JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"

_T = TypeVar("_T")
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
        found = json.dumps(self._value, ensure_ascii=False)
        found = found if len(found) <= _SHOWN else found[: _SHOWN - 3] + "..."
        where = f"{self._document}: {self._path}" if self._path else self._document
        raise BundleError(f"{where} is {found}; expected {expected}: {self._advice}")

    def text(self) -> str:
        """A string that is not empty."""
        if not isinstance(self._value, str) or not self._value:
            self.fail("a text")
        return self._value

    def integer(self, low: int = 0, high: int = 2**53) -> int:
        """A whole number from `low` to `high`."""
        if not isinstance(self._value, int) or isinstance(self._value, bool) or not low <= self._value <= high:
            self.fail(f"a whole number of at least {low}" if high == 2**53 else f"a whole number from {low} to {high}")
        return self._value

    def number(self) -> float:
        """A finite number."""
        if not isinstance(self._value, (int, float)) or isinstance(self._value, bool) or not math.isfinite(self._value):
            self.fail("a finite number")
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
        BundleError: not UTF-8, not JSON, or with numbers that are none (NaN, Infinity).
    """
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BundleError(f"{document} is no JSON ({error}); expected UTF-8 JSON: {advice}") from error
    return Field(value, "", document, advice)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
