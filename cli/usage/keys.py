"""What keys do: a state in, a key, the next state out.

`Keys` makes names of keys from what a terminal sends: letters are themselves, others are called
up, down, left, right, page up, page down, home, end, enter, backspace, escape. Source of the
sequences: xterm's "Control Sequences" document, which terminals of today follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cli.usage.rows import VIEWS, View, with_rates

__all__ = ["Keys", "State", "press"]

_SEQUENCES = {
    b"[A": "up",
    b"[B": "down",
    b"[C": "right",
    b"[D": "left",
    b"OA": "up",
    b"OB": "down",
    b"OC": "right",
    b"OD": "left",
    b"[5~": "page up",
    b"[6~": "page down",
    b"[H": "home",
    b"[F": "end",
    b"OH": "home",
    b"OF": "end",
    b"[1~": "home",
    b"[4~": "end",
    b"[7~": "home",
    b"[8~": "end",
}
_PLAIN = {
    b"\r": "enter",
    b"\n": "enter",
    b"\x7f": "backspace",
    b"\x08": "backspace",
    b"\x15": "erase",  # Ctrl-U
    b"\x0c": "redraw",  # Ctrl-L
}
SEQUENCE_MAX = 16  # bytes; what is longer is none
FILTER_MAX = 60  # characters


class Keys:
    """Finds keys in what a terminal sends, in whatever pieces it comes."""

    def __init__(self) -> None:
        self._left = b""

    @property
    def waiting(self) -> bool:
        """It may be Escape, or the beginning of a sequence: call `rest` if nothing comes."""
        return bool(self._left)

    def rest(self) -> list[str]:
        """Nothing has come after what is waiting."""
        left, self._left = self._left, b""
        return ["escape"] if left.startswith(b"\x1b") else []

    def feed(self, data: bytes) -> list[str]:
        """The keys that are complete."""
        data, self._left = self._left + data, b""
        found: list[str] = []
        while data:
            key, used = _first(data)
            if used == 0:
                self._left = data
                break
            if key:
                found.append(key)
            data = data[used:]
        return found


def _first(data: bytes) -> tuple[str, int]:
    """The first key, empty for one without a meaning, and its length; 0: it is not complete."""
    if data[:1] in _PLAIN:
        return _PLAIN[data[:1]], 1
    if data[:1] == b"\x1b":
        return _escaped(data)
    if data[0] < 0x20:
        return "", 1
    length = 1 if data[0] < 0x80 else 2 if data[0] < 0xE0 else 3 if data[0] < 0xF0 else 4
    if len(data) < length:
        return "", 0
    text = data[:length].decode(errors="ignore")
    return text if text.isprintable() else "", length


def _escaped(data: bytes) -> tuple[str, int]:
    if len(data) == 1:
        return "", 0
    if data[1:2] not in (b"[", b"O"):
        return "escape", 1
    for length in range(3, min(len(data), SEQUENCE_MAX) + 1):
        # A sequence ends with the first byte from @ on.
        if data[length - 1] >= 0x40:
            return _SEQUENCES.get(data[1:length], ""), length
    return "", 0 if len(data) < SEQUENCE_MAX else len(data)


@dataclass(frozen=True, slots=True)
class State:
    """What is shown and how."""

    view_name: str
    # By view: the column that it is sorted by. Absent: the view's own.
    sorts: Mapping[str, int] = field(default_factory=dict)
    reverse: bool = False
    only: str = ""
    # What is typed: "" (commands), "filter", "sort" or "help".
    mode: str = ""
    paused: bool = False
    # The first row that is shown.
    first: int = 0
    rates: bool = False
    ended: bool = False

    @property
    def view(self) -> View:
        view = VIEWS[self.view_name]
        return with_rates(view) if self.rates else view

    @property
    def sort(self) -> int:
        return self.sorts.get(self.view_name, self.view.column(self.view.sort))


_VIEW_KEYS = {name[0]: name for name in VIEWS}


def press(state: State, key: str, *, rows: int, page: int) -> State:
    """The state after a key. `rows`: how many there are, of which `page` are seen at a time."""
    if state.mode == "filter":
        return _typed(state, key)
    if state.mode == "sort":
        return _chosen(state, key)
    if state.mode == "help":
        return replace(state, mode="", ended=key == "q")
    if key in _VIEW_KEYS:
        return replace(state, view_name=_VIEW_KEYS[key], first=0, reverse=False)
    moved = _moved(state.first, key, rows=rows, page=page)
    if moved is not None:
        return replace(state, first=max(0, min(moved, rows - page)))
    if key in ("<", ">", "left", "right"):
        step = -1 if key in ("<", "left") else 1
        return _sorted(state, (state.sort + step) % len(state.view.columns))
    match key:
        case "q":
            return replace(state, ended=True)
        case "r":
            return replace(state, reverse=not state.reverse, first=0)
        case "p" | " ":
            return replace(state, paused=not state.paused)
        case "i":
            return replace(state, rates=not state.rates)
        case "o":
            return replace(state, mode="sort")
        case "/":
            return replace(state, mode="filter")
        case "h" | "?":
            return replace(state, mode="help")
        case "escape":
            return replace(state, only="", first=0)
    return state


def _moved(first: int, key: str, *, rows: int, page: int) -> int | None:
    """Where a key that scrolls goes to; None: it is not one."""
    return {
        "down": first + 1,
        "j": first + 1,
        "up": first - 1,
        "k": first - 1,
        "page down": first + page,
        "page up": first - page,
        "home": 0,
        "g": 0,
        "end": rows,
        "G": rows,
    }.get(key)


def _sorted(state: State, column: int) -> State:
    return replace(
        state, sorts={**state.sorts, state.view_name: column}, reverse=False, first=0, mode=""
    )


def _typed(state: State, key: str) -> State:
    match key:
        case "enter":
            return replace(state, mode="")
        case "escape":
            return replace(state, mode="", only="", first=0)
        case "backspace":
            return replace(state, only=state.only[:-1], first=0)
        case "erase":
            return replace(state, only="", first=0)
    if len(key) == 1 and len(state.only) < FILTER_MAX:
        return replace(state, only=state.only + key, first=0)
    return state


def _chosen(state: State, key: str) -> State:
    if key.isdecimal() and key.isascii() and 1 <= (int(key) or 10) <= len(state.view.columns):
        return _sorted(state, (int(key) or 10) - 1)
    if key in ("<", ">", "left", "right"):
        step = -1 if key in ("<", "left") else 1
        moved = _sorted(state, (state.sort + step) % len(state.view.columns))
        return replace(moved, mode="sort")
    return replace(state, mode="")
