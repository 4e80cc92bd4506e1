"""Regular expressions whose matching takes time proportional to the text, whatever they are.

Users give them to the manager, so no expression may keep it busy: Python's `re` tries one way after
another and needs exponential time for `(a|a)*b`. Here an expression becomes its position automaton
(V. M. Glushkov, "The abstract theory of automata", 1961; also Berry and Sethi 1986): a state is a
set of positions, kept as the bits of a number, and each character leads from one state to another,
remembered once worked out.

A pattern describes the whole text, as in Prometheus' label matchers: write `.*` around it to find
it anywhere. `^` at the beginning and `$` at the end are allowed and change nothing. Upper and lower
case are the same.

    literals  .  [a-z]  [^0-9]  \\d \\w \\s \\D \\W \\S  \\. and other marks  ( ) (?: )  |
    *  +  ?  {2}  {2,}  {2,5}   (a ? after one of them is allowed: all ways are tried at once)

Not offered, since a set of positions cannot say them: references back, looking around, `\\b`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PATTERN_CHARS_MAX = 256
# Characters and groups, with {m,n} written out; making the automaton takes their square.
POSITIONS_MAX = 256
_DEPTH_MAX = 32
# Steps remembered, at some 100 bytes each; beyond, the memory begins anew.
_STEPS_MAX = 4_096
_DIGITS = frozenset("0123456789")


class PatternError(ValueError):
    """The text is not a pattern; says why."""


@dataclass(frozen=True, slots=True)
class _Chars:
    """A set of characters: single ones, ranges, and kinds such as digits."""

    ranges: tuple[tuple[str, str], ...] = ()
    kinds: tuple[Callable[[str], bool], ...] = ()
    negated: bool = False

    def has(self, char: str) -> bool:
        forms = {f for f in (char, char.lower(), char.upper()) if len(f) == 1}
        found = any(a <= f <= b for f in forms for a, b in self.ranges) or any(
            kind(char) for kind in self.kinds
        )
        return found != self.negated


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_KINDS: dict[str, Callable[[str], bool]] = {"d": str.isdecimal, "w": _is_word, "s": str.isspace}
_ANY = _Chars(ranges=(("\n", "\n"),), negated=True)


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the expression by its positions: where it may begin and end, and whether it may be
    empty.
    """

    first: int = 0
    last: int = 0
    empty: bool = True


class Pattern:
    """A compiled expression. Raises PatternError for a text that is none."""

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > PATTERN_CHARS_MAX:
            raise PatternError(
                f"it has {len(text)} characters, more than the limit of {PATTERN_CHARS_MAX}"
            )
        reader = _Reader(text)
        whole = reader.whole()
        self._chars = reader.chars
        self._follow = reader.follow
        self._last = whole.last
        self._first = whole.first
        self._empty = whole.empty
        self._at: dict[str, int] = {}  # character -> the positions that take it
        self._steps: dict[tuple[int, str], int] = {}

    def matches(self, text: str) -> bool:
        """Whether the whole text is as described; O(its length)."""
        if not text:
            return self._empty
        state = self._first & self._taking(text[0])
        steps = self._steps
        for char in text[1:]:
            if not state:
                return False
            after = steps.get((state, char))
            state = self._step(state, char) if after is None else after
        return bool(state & self._last)

    def _step(self, state: int, char: str) -> int:
        after, rest = 0, state
        while rest:
            position = (rest & -rest).bit_length() - 1
            after |= self._follow[position]
            rest &= rest - 1
        after &= self._taking(char)
        if len(self._steps) >= _STEPS_MAX:
            self._steps.clear()
        self._steps[state, char] = after
        return after

    def _taking(self, char: str) -> int:
        found = self._at.get(char)
        if found is None:
            if len(self._at) >= _STEPS_MAX:
                self._at.clear()
            found = sum(1 << i for i, chars in enumerate(self._chars) if chars.has(char))
            self._at[char] = found
        return found


class _Reader:
    """Reads an expression from left to right, making its positions."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._i = 0
        self._parts = 0
        self.chars: list[_Chars] = []
        self.follow: list[int] = []

    def whole(self) -> _Part:
        if self._peek() == "^":
            self._i += 1
        part = self._either(0)
        if self._i < len(self._text):
            raise PatternError(f"the ) at character {self._i + 1} closes nothing")
        return part

    def _peek(self) -> str:
        return self._text[self._i : self._i + 1]

    def _take(self, expected: str) -> bool:
        if self._text.startswith(expected, self._i):
            self._i += len(expected)
            return True
        return False

    def _either(self, depth: int) -> _Part:
        if depth > _DEPTH_MAX:
            raise PatternError(f"its groups are nested deeper than {_DEPTH_MAX}")
        part = self._sequence(depth)
        while self._take("|"):
            other = self._sequence(depth)
            part = _Part(
                part.first | other.first, part.last | other.last, part.empty or other.empty
            )
        return part

    def _sequence(self, depth: int) -> _Part:
        part = _Part()
        while (char := self._peek()) and char not in "|)":
            if char == "$" and self._i == len(self._text) - 1:
                self._i += 1
                break
            part = self._then(part, self._repeated(depth))
        return part

    def _then(self, a: _Part, b: _Part) -> _Part:
        self._join(a.last, b.first)
        return _Part(
            a.first | b.first if a.empty else a.first,
            b.last | a.last if b.empty else b.last,
            a.empty and b.empty,
        )

    def _join(self, last: int, first: int) -> None:
        while last:
            self.follow[(last & -last).bit_length() - 1] |= first
            last &= last - 1

    def _repeated(self, depth: int) -> _Part:
        begin = self._i
        part = self._one(depth)
        times = self._times()
        if times is None:
            return part
        after = self._i
        if (char := self._peek()) and char in "*+?{":
            raise PatternError(f"the {char} at character {after + 1} repeats a repetition")
        part = self._times_over(part, begin, depth, *times)
        self._i = after
        return part

    def _times(self) -> tuple[int, int | None] | None:
        """How often the part before may come; None: once, nothing is said."""
        char = self._peek()
        times: tuple[int, int | None]
        if char == "{":
            times = self._counted()
        elif char and char in "*+?":
            self._i += 1
            times = (1 if char == "+" else 0, 1 if char == "?" else None)
        else:
            return None
        self._take("?")
        return times

    def _counted(self) -> tuple[int, int | None]:
        end = self._text.find("}", self._i)
        low, comma, high = self._text[self._i + 1 : end].partition(",")
        ok = end > 0 and low and set(low) <= _DIGITS and set(high) <= _DIGITS
        if not ok or len(low) > 4 or len(high) > 4:
            raise PatternError(
                "a { begins a number of times, as {2} or {2,5}; write \\{ for itself"
            )
        self._i = end + 1
        least = int(low)
        most = int(high) if high else (None if comma else least)
        if most is not None and most < least:
            raise PatternError(f"{{{low},{high}}}: the second number is less than the first")
        return least, most

    def _times_over(
        self, part: _Part, begin: int, depth: int, least: int, most: int | None
    ) -> _Part:
        """The part so many times in a row. Each time has positions of its own, made by reading the
        text from `begin` again.
        """
        if most == 0:
            return _Part()
        copies = max(1, least) if most is None else most
        out = _Part()
        for i in range(copies):
            if i:
                self._i = begin
                part = self._one(depth)
            if most is None and i == copies - 1:
                self._join(part.last, part.first)
            if i >= least:
                part = _Part(part.first, part.last, empty=True)
            out = self._then(out, part)
        return out

    def _one(self, depth: int) -> _Part:
        self._parts += 1  # groups without a character count too: reading them again costs time
        if self._parts > POSITIONS_MAX:
            raise PatternError(f"written out it has more than {POSITIONS_MAX} parts")
        char = self._peek()
        self._i += 1
        match char:
            case "(":
                return self._group(depth)
            case "[":
                return self._position(self._class())
            case ".":
                return self._position(_ANY)
            case "\\":
                return self._position(self._escaped())
            case "*" | "+" | "?" | "{":
                raise PatternError(f"the {char} at character {self._i} repeats nothing")
            case "^" | "$":
                raise PatternError(
                    f"{char} has a meaning at the beginning (^) or the end ($) only; "
                    f"write \\{char} for itself"
                )
            case _:
                return self._position(_Chars(ranges=((char, char),)))

    def _group(self, depth: int) -> _Part:
        if self._peek() == "?" and not self._take("?:"):
            raise PatternError("of groups with (? only (?: is offered")
        part = self._either(depth + 1)
        if not self._take(")"):
            raise PatternError("a ( is not closed")
        return part

    def _position(self, chars: _Chars) -> _Part:
        self.chars.append(chars)
        self.follow.append(0)
        bit = 1 << (len(self.chars) - 1)
        return _Part(bit, bit, empty=False)

    def _escaped(self) -> _Chars:
        char = self._peek()
        self._i += 1
        if char.lower() in _KINDS and char:
            return _Chars(kinds=(_KINDS[char.lower()],), negated=char.isupper())
        if not char or char.isalnum():
            raise PatternError(
                f"\\{char} is not offered; a \\ stands before d, w, s, D, W, S or a mark such as ."
            )
        return _Chars(ranges=((char, char),))

    def _class(self) -> _Chars:
        ranges: list[tuple[str, str]] = []
        kinds: list[Callable[[str], bool]] = []
        negated = self._take("^")
        first = True
        while (char := self._peek()) != "]" or first:
            if not char:
                raise PatternError("a [ is not closed")
            first = False
            one = self._member(kinds)
            if one is None:
                continue
            if self._peek() == "-" and self._text[self._i + 1 : self._i + 2] not in ("", "]"):
                self._i += 1
                last = self._member(kinds)
                if last is None or last < one:
                    raise PatternError(f"[{one}-...]: the range ends before it begins")
                ranges.append((one, last))
            else:
                ranges.append((one, one))
        self._i += 1
        return _Chars(tuple(ranges), tuple(kinds), negated)

    def _member(self, kinds: list[Callable[[str], bool]]) -> str | None:
        """The next character of a class; None: it was a kind, which is noted."""
        char = self._peek()
        self._i += 1
        if char != "\\":
            return char
        inner = self._escaped()
        if not inner.kinds:
            return inner.ranges[0][0]
        kind, negated = inner.kinds[0], inner.negated
        kinds.append((lambda c: not kind(c)) if negated else kind)
        return None
