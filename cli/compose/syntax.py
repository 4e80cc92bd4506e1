"""Where a text is no YAML, and what most often is behind that."""

from __future__ import annotations

import yaml

from cli.compose.problems import Mark, Source


def mark_of_offset(source: Source, offset: int) -> Mark:
    before = source.text[: max(offset, 0)]
    line = before.count("\n") + 1
    return Mark(source, line, offset - (before.rfind("\n") + 1) + 1)


def explain(source: Source, error: yaml.MarkedYAMLError, line: int) -> tuple[str, str]:
    """libyaml's words, and what most often is behind them."""
    problem = error.problem or "not valid YAML"
    text = source.line(line)
    before = source.line(line - 1)
    context = ""
    if error.context:
        context = f" {error.context}"
        if error.context_mark is not None and error.context_mark.line + 1 != line:
            context += f" that began in line {error.context_mark.line + 1}"
    hint = "check the indentation of this line and the one above, and put odd text in quotes"
    if "\t" in text[: len(text) - len(text.lstrip())]:
        hint = "the line begins with a tab; indent with spaces"
    elif "\t" in text and "token" in problem:
        hint = "there is a tab here; use spaces"
    elif "cannot start any token" in problem:
        hint = "put text that begins with @, `, %, or another special character in quotes"
    elif "mapping values are not allowed" in problem:
        hint = (
            'put text that contains ": " in quotes'
            if text.count(": ") > 1
            else "check the indentation: a key below a value cannot have a value of its own"
        )
    elif "did not find expected key" in problem or "block end" in problem:
        hint = "this line does not line up with its neighbours; check the indentation"
    elif "could not find expected ':'" in problem:
        hint = f"a key needs a colon and a space after it; the line above is: {before.strip()}"
    elif "quoted scalar" in context:
        hint = "a closing quote is missing"
    elif "flow" in context:
        hint = "a closing bracket or a comma is missing"
    return f"not valid YAML: {problem}{context}", hint
