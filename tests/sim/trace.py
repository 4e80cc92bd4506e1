"""What happened, as lines for people and as one number that two runs can be compared by."""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass

KEPT = 4_000  # lines


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that did not hold."""

    rule: str
    text: str
    at_s: float

    def __str__(self) -> str:
        return f"{self.rule} at {self.at_s:.3f} s: {self.text}"


class Trace:
    """`print_all`: show each line as it comes."""

    def __init__(self, *, print_all: bool = False) -> None:
        self.lines: deque[tuple[float, str]] = deque(maxlen=KEPT)
        self.digest = 0
        self.count = 0
        self._print = print_all

    def note(self, at_s: float, text: str) -> None:
        self.lines.append((at_s, text))
        self.count += 1
        self.digest = zlib.crc32(f"{at_s:.6f} {text}".encode(), self.digest)
        if self._print:
            print(f"{at_s:10.3f}  {text}")

    def tail(self, lines: int) -> str:
        return "\n".join(f"{at:10.3f}  {text}" for at, text in list(self.lines)[-lines:])
