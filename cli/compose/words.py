"""A command line's words, split as the docker CLI splits them (github.com/google/shlex).

It is no shell: nothing is expanded. It differs from Python's shlex in double quotes, where a
backslash takes the next character whatever it is ("a\\nb" is anb), and in comments, which begin
where a word would.
"""

from __future__ import annotations

import re

_PLAIN = re.compile(r"[^ \t\r\n\\'\"]+")
_QUOTED = {"'": re.compile(r"([^']*)'"), '"': re.compile(r'((?:[^"\\]|\\.)*)"', re.DOTALL)}
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


def split_words(text: str) -> list[str]:
    """The words of a line. Raises ValueError when a quote or an escape is not ended."""
    words: list[str] = []
    word: list[str] = []  # the parts of the word so far
    inside = False
    index = 0
    while index < len(text):
        char = text[index]
        if char in " \t\r\n":
            if inside:
                words.append("".join(word))
                word, inside = [], False
            index += 1
            continue
        if char == "#" and not inside:
            end = text.find("\n", index)
            index = len(text) if end < 0 else end + 1
            continue
        inside = True
        if char == "\\":
            if index + 1 >= len(text):
                raise ValueError("no character follows the last backslash")
            word.append(text[index + 1])
            index += 2
        elif char in _QUOTED:
            match = _QUOTED[char].match(text, index + 1)
            if match is None:
                raise ValueError(f"a {char} is not closed")
            word.append(match[1] if char == "'" else _ESCAPED.sub(r"\1", match[1]))
            index = match.end()
        else:
            match = _PLAIN.match(text, index)
            assert match is not None
            word.append(match[0])
            index = match.end()
    if inside:
        words.append("".join(word))
    return words
