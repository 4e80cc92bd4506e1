"""From a template's text to tokens. Source: Go's text/template/parse, its lexer.

White space at trim markers is gone afterwards, and so are comments. Tokens say whether white space
stands before them, for `.A .B` are two values and `.A.B` is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from swarm.gotemplate.values import Fault

# Go cuts these at trim markers, and no other white space.
_SPACES = " \t\r\n"
_TOKEN = re.compile(
    r"""
      (?P<string>"(?:\\.|[^"\\\n])*"|`[^`]*`)
    | (?P<char>'(?:\\[^\n]|[^'\\\n])[^'\n]*')
    | (?P<number>[-+]?(?:\d|\.\d)(?:[eEpP][-+]|[\w.])*)
    | (?P<variable>\$\w*)
    | (?P<field>\.[^\W\d]\w*)
    | (?P<dot>\.)
    | (?P<word>[^\W\d]\w*)
    | (?P<sign>:=|=|\||\(|\)|,)
    """,
    re.VERBOSE,
)
_CLOSE = re.compile(rf"[{_SPACES}]+-\}}\}}|\}}\}}")
_SPACE_RUN = re.compile(rf"[{_SPACES}]+")
# What may follow a name or a field.
_END_OF_NAME = frozenset(" \t\r\n.,|:=()}")


@dataclass(frozen=True, slots=True)
class Token:
    """One token; `at` is its offset in the text."""

    kind: str  # text, open, close, or a group of _TOKEN
    text: str
    at: int
    apart: bool = False


def tokens(text: str) -> Iterator[Token]:
    """All tokens. Raises Fault with an offset."""
    position, trim = 0, False
    while True:
        start = text.find("{{", position)
        piece = text[position:] if start < 0 else text[position:start]
        at = position
        if trim:
            at += len(piece) - len(piece := piece.lstrip(_SPACES))
        if start < 0:
            if piece:
                yield Token("text", piece, at)
            return
        position = start + 2
        if text.startswith("-", position) and text[position + 1 : position + 2] in tuple(_SPACES):
            piece = piece.rstrip(_SPACES)
            position += 2
        if piece:
            yield Token("text", piece, at)
        if comment := _comment(text, position, start):
            position, trim = comment
            continue
        yield Token("open", "{{", start)
        for token in _action(text, position, start):
            yield token
        position = token.at + len(token.text)
        trim = token.text.endswith("-}}")


def _comment(text: str, position: int, start: int) -> tuple[int, bool] | None:
    """Where the comment's action ends and whether it trims; None: it is no comment."""
    space = _SPACE_RUN.match(text, position)
    begin = space.end() if space and text[start + 2] == "-" else position
    if not text.startswith("/*", begin):
        return None
    end = text.find("*/", begin + 2)
    close = _CLOSE.match(text, end + 2) if end >= 0 else None
    if close is None:
        raise Fault('a comment is not closed with "*/}}"', start)
    return close.end(), close[0].endswith("-}}")


def _action(text: str, position: int, start: int) -> Iterator[Token]:
    """The tokens of an action; the last one is `close`."""
    # As in `{{- .A}}`, where the marker has taken the white space.
    apart = True
    while True:
        if close := _CLOSE.match(text, position):
            yield Token("close", close[0], position)
            return
        if space := _SPACE_RUN.match(text, position):
            position, apart = space.end(), True
            continue
        if position >= len(text):
            raise Fault('an action is not closed: "{{" without "}}"', start)
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise _unreadable(text, position)
        kind = match.lastgroup
        position = match.end()
        if kind in ("word", "field", "variable", "number") and position < len(text):
            _check_end(text, position, match)
        yield Token(kind, match[0], match.start(), apart)
        apart = False


def _unreadable(text: str, position: int) -> Fault:
    letter = text[position]
    if letter in "\"'`":
        return Fault(f"the text that begins with {letter} is not closed", position)
    return Fault(f"{letter!r} cannot be read here", position)


def _check_end(text: str, position: int, match: re.Match[str]) -> None:
    letter = text[position]
    if letter in _END_OF_NAME:
        return
    word = match[0]
    hint = ""
    if letter == "-" and match.lastgroup == "field":
        hint = (
            "; a name with other characters than letters, digits and _ is read with index, as in "
            '{{index .Service.Labels "a-b"}}'
        )
    raise Fault(f"{letter!r} after {word} cannot be read here{hint}", position)


# ------------------------------------------------------------------ literals

_ESCAPES = {
    "a": 7,
    "b": 8,
    "f": 12,
    "n": 10,
    "r": 13,
    "t": 9,
    "v": 11,
    "\\": 92,
    "'": 39,
    '"': 34,
}
_ESCAPE = re.compile(
    r"\\(?:(?P<octal>[0-7]{3})|x(?P<byte>[0-9a-fA-F]{2})|u(?P<four>[0-9a-fA-F]{4})"
    r"|U(?P<eight>[0-9a-fA-F]{8})|(?P<letter>.)|$)",
    re.DOTALL,
)
_INTEGER_BITS = 64


def unquote(token: Token) -> str:
    """The string that a Go literal stands for. Bytes that are no UTF-8 are surrogates, as Python
    has them in file names.
    """
    if token.text.startswith("`"):
        return token.text[1:-1].replace("\r", "")
    return _unescape(token, token.text[1:-1], '"')


def rune(token: Token) -> int:
    """The number that a character literal stands for."""
    inner = token.text[1:-1]
    escape = _ESCAPE.fullmatch(inner)
    if escape is not None and (escape["octal"] or escape["byte"]):
        return _code(token, escape, "'")
    text = _unescape(token, inner, "'")
    if len(text) != 1:
        raise Fault(f"{token.text} is not one character", token.at)
    return ord(text)


def _unescape(token: Token, inner: str, quote: str) -> str:
    if "\\" not in inner:
        return inner
    out, position = bytearray(), 0
    for escape in _ESCAPE.finditer(inner):
        out += inner[position : escape.start()].encode(errors="surrogateescape")
        code = _code(token, escape, quote)
        if escape["octal"] or escape["byte"]:
            out.append(code)
        else:
            out += chr(code).encode()
        position = escape.end()
    out += inner[position:].encode(errors="surrogateescape")
    return out.decode(errors="surrogateescape")


def _code(token: Token, escape: re.Match[str], quote: str) -> int:
    if escape["octal"]:
        code = int(escape["octal"], 8)
    elif escape["byte"]:
        code = int(escape["byte"], 16)
    elif escape["four"] or escape["eight"]:
        code = int(escape["four"] or escape["eight"], 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise Fault(f"{escape[0]} in {token.text} is no character", token.at)
        return code
    else:
        letter = escape["letter"]
        if letter not in _ESCAPES or (letter in "'\"" and letter != quote):
            raise Fault(f"{escape[0]} in {token.text} is no escape of Go", token.at)
        return _ESCAPES[letter]
    if code > 0xFF:
        raise Fault(f"{escape[0]} in {token.text} is no byte", token.at)
    return code


def number(token: Token) -> int | float:
    """The number that a literal stands for: 12, 0x1F, 0o17, 017, 0b1, 1_000, 1.5, 1e3, 0x1p-2."""
    text = token.text
    digits = text.lstrip("+-")
    try:
        return _integer(token, digits)
    except ValueError:
        pass
    try:
        if digits[:2].lower() == "0x":
            if "p" not in digits.lower():
                raise ValueError(digits)
            return float.fromhex(text.replace("_", ""))
        if digits.isdigit():  # such as 09, which is neither octal nor decimal
            raise ValueError(digits)
        value = float(text)
    except (ValueError, OverflowError):
        hint = "; complex numbers are not offered" if digits.endswith("i") else ""
        raise Fault(f"{text} is not a number{hint}", token.at) from None
    if value in (float("inf"), float("-inf")):
        raise Fault(f"{text} is too large", token.at)
    return value


def _integer(token: Token, digits: str) -> int:
    octal = len(digits) > 1 and digits[0] == "0" and digits[1] in "01234567_"
    value = int(digits.replace("_", ""), 8) if octal else int(digits, 0)
    if value.bit_length() >= _INTEGER_BITS:
        raise Fault(f"{token.text} is too large", token.at)
    return -value if token.text.startswith("-") else value
