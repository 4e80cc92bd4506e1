"""A command line's words, split as the docker CLI splits them (github.com/google/shlex).

It is no shell: nothing is expanded. It differs from Python's shlex in double quotes, where a
backslash takes the next character whatever it is ("a\\nb" is anb), and in comments, which begin
where a word would.
"""

from __future__ import annotations

_SPACE = " \t\r\n"


def split_words(text: str) -> list[str]:
    """The words of a line. Raises ValueError when a quote or an escape is not ended."""
    words: list[str] = []
    word: list[str] | None = None
    index = 0
    while index < len(text):
        char = text[index]
        index += 1
        if char in _SPACE:
            if word is not None:
                words.append("".join(word))
                word = None
        elif char == "#" and word is None:
            end = text.find("\n", index)
            index = len(text) if end < 0 else end + 1
        elif char == "\\":
            if index >= len(text):
                raise ValueError("no character follows the last backslash")
            word = [*(word or ()), text[index]]
            index += 1
        elif char in "'\"":
            quoted, index = _quoted(text, index, char)
            word = [*(word or ()), quoted]
        else:
            word = [*(word or ()), char]
    if word is not None:
        words.append("".join(word))
    return words


def _quoted(text: str, index: int, quote: str) -> tuple[str, int]:
    """What stands between quotes, and the index after them. Single quotes know no escapes."""
    found: list[str] = []
    while index < len(text):
        char = text[index]
        index += 1
        if char == quote:
            return "".join(found), index
        if char == "\\" and quote == '"':
            if index >= len(text):
                break
            char = text[index]
            index += 1
        found.append(char)
    raise ValueError(f"a {quote} is not closed")
