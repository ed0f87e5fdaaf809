"""Tables of results, for a terminal or in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


class Table:
    """A title, a line of column names, and rows; the first column is words, the others numbers."""

    def __init__(self, title: str, *columns: str) -> None:
        """Begin without rows."""
        self.title = title
        self.columns = columns
        self.rows: list[list[str]] = []
        self.notes: list[str] = []

    def add(self, *cells: str) -> None:
        """Add a row."""
        self.rows.append(list(cells))

    def text(self) -> str:
        """Return it for a terminal."""
        lines = [list(self.columns), *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        shown = []
        for first, *others in lines:
            numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:]))
            shown.append("  ".join(["  " + first.ljust(widths[0]), *numbers]).rstrip())
        return "\n".join([self.title, *shown, *self.notes, ""])

    def markdown(self) -> str:
        """Return it in Markdown."""
        head = ["| " + " | ".join(self.columns) + " |", "|---" + "|---:" * (len(self.columns) - 1) + "|"]
        rows = ["| " + " | ".join(row) + " |" for row in self.rows]
        notes = ["", *self.notes] if self.notes else []
        return "\n".join([f"### {self.title}", "", *head, *rows, *notes, ""])


def duration(nanoseconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:#.3g} {unit}".replace(". ", " ")
    return f"{nanoseconds:.0f} ns"


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that *share* (0 to 1) of the values don't exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> str:
    """Return the middle half of the values, as durations."""
    return f"{duration(quantile(values, 0.25))} … {duration(quantile(values, 0.75))}"


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)
