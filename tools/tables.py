"""Rows of figures as text; standard library only."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
"""One line of a table: plain values by column; ``error`` where it could not be measured."""


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as aligned text; a row that failed ends with its error."""
    body = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *body, strict=True)]
    lines = ["  ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True))]
    for row, cells in zip(rows, body, strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{line}  FAILED: {row['error']}" if "error" in row else line)
    return "\n".join(line.rstrip() for line in lines)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
