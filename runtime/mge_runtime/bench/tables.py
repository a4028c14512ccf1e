"""Tables as text for a terminal and as Markdown for an issue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Table", "markdown_row"]


@dataclass(frozen=True)
class Table:
    """A title, a header, rows of as many cells, and lines below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> Iterator[str]:
        """Lines with aligned columns; the first to the left, the others to the right."""
        yield self.title
        lines = [list(self.header), *map(list, self.rows)] if self.rows else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = [c.ljust(w) if not n else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True))]
            yield "  " + "  ".join(cells).rstrip()
        yield from (f"  {note}" for note in self.notes)

    def markdown(self) -> Iterator[str]:
        """Lines with a heading, a table and a list."""
        yield from (f"#### {self.title}", "")
        if self.rows:
            yield markdown_row(self.header)
            yield "|" + "|".join("---" if not number else "---:" for number in range(len(self.header))) + "|"
            yield from map(markdown_row, self.rows)
            yield ""
        if self.notes:
            yield from (f"- {note}" for note in self.notes)
            yield ""


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
