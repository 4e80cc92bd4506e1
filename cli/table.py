"""Tables as Docker's CLI draws them: columns at least 10 wide, 3 spaces apart, no lines.

The method is Go's text/tabwriter with minwidth 10 and padding 3, except that spaces at the end of a
line are left out. Where the table is wider than the terminal, columns stand closer, and empty ones
are left out. A column that holds sentences (ERROR) is never cut: it is wrapped, and where that
leaves too little room its text stands under the row.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence

__all__ = ["layout", "text_width", "wrapped"]

MIN_WIDTH = 10  # characters; tabwriter's minwidth in Docker's CLI
PADDING = 3  # characters between columns
PADDING_TIGHT = 2  # where the terminal is too narrow for more
WRAP_MIN = 28  # a narrower column of sentences is hard to read
_INDENT = "    "


def text_width(text: str) -> int:
    """Columns the text takes on a terminal."""
    if text.isascii():
        return len(text)
    width = 0
    for letter in text:
        if unicodedata.combining(letter):
            continue
        width += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
    return width


def wrapped(text: str, width: int | None, *, hanging: str = "") -> list[str]:
    """The text on lines of at most `width` (None: no limit), each indented as the first is, those
    after it by `hanging` besides. A word that is longer stays whole, so that it can be copied.
    """
    if width is None or text_width(text) <= width:
        return [text]
    indent = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text.strip(),
        max(width, WRAP_MIN),
        initial_indent=indent,
        subsequent_indent=indent + hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def layout(
    rows: Sequence[Sequence[str]], *, width: int | None = None, sentences: int | None = None
) -> list[str]:
    """The lines of a table; the first row is the header. `width` is the terminal's in characters
    (None: no limit); `sentences` is the index of the column that may be wrapped.
    """
    if not rows:
        return []
    widths = _widths(rows)
    if width is None or _longest(rows) <= width:
        return [_line(row, widths) for row in rows]
    if sentences is None:
        return _closer(rows, width)
    without = [[c for i, c in enumerate(row) if i != sentences] for row in rows]
    room = width - _longest(without) - PADDING
    if room >= WRAP_MIN:
        return _wrapped(rows, sentences, room)
    return _below(rows, without, sentences, width)


def _widths(
    rows: Sequence[Sequence[str]], *, least: int = MIN_WIDTH, padding: int = PADDING
) -> list[int]:
    count = max(len(row) for row in rows)
    return [
        max(least, *(text_width(row[i]) + padding for row in rows if i < len(row)))
        for i in range(count)
    ]


def _longest(rows: Sequence[Sequence[str]]) -> int:
    widths = _widths(rows)
    return max(text_width(_line(row, widths)) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell + " " * (widths[i] - text_width(cell)) for i, cell in enumerate(row[:-1])]
    return "".join([*cells, row[-1]]).rstrip() if row else ""


def _wrapped(rows: Sequence[Sequence[str]], column: int, room: int) -> list[str]:
    """Each row as several rows: the wrapped column's text goes on under itself."""
    split: list[list[str]] = []
    for row in rows:
        pieces = textwrap.wrap(row[column], room) or [""]
        for number, piece in enumerate(pieces):
            cells = [cell if number == 0 else "" for cell in row]
            cells[column] = piece
            split.append(cells)
    widths = _widths(split)
    return [_line(row, widths) for row in split]


def _filled(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The columns that hold anything below the header."""
    count = len(rows[0])
    kept = [i for i in range(count) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _closer(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Columns closer together; where that is not enough, without the empty ones. A row that does
    not fit even so is left to the terminal, as nothing in it may be cut.
    """
    widths = _widths(rows, least=1, padding=PADDING_TIGHT)
    if max(text_width(_line(row, widths)) for row in rows) > width and len(rows) > 1:
        rows = _filled(rows)
        widths = _widths(rows, least=1, padding=PADDING_TIGHT)
    return [_line(row, widths) for row in rows]


def _below(
    rows: Sequence[Sequence[str]], without: Sequence[Sequence[str]], column: int, width: int
) -> list[str]:
    widths = _widths(without)
    if _longest(without) > width:
        without = _filled(without)
        widths = _widths(without, least=1, padding=PADDING_TIGHT)
    lines: list[str] = []
    for row, rest in zip(rows, without, strict=True):
        lines.append(_line(rest, widths))
        if row is not rows[0] and row[column]:
            text = f"{rows[0][column].lower()}: {row[column]}"
            lines += textwrap.wrap(
                text,
                max(width, 20),
                initial_indent=_INDENT,
                subsequent_indent=_INDENT * 2,
            )
    return lines
