"""How answers are shown: as a table, a Go template, JSON or YAML; what `--format` and `--quiet`
mean.

Commands make rows (`Record`s: every field a template may name) and say which of them are columns;
the rest is done here. Everything goes to stdout; the caller has already decided on errors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from cli.settings import Terminal
from cli.table import layout
from cli.template import Template, to_json
from swarm.gotemplate import Record, show

__all__ = ["Column", "Record", "print_inspected", "print_rows", "short_id", "to_yaml"]

Column = tuple[str, str]  # header, field
_ESCAPES = (("\\t", "\t"), ("\\n", "\n"))
SHORT_ID = 12  # characters of an id in tables, as in Docker


def short_id(id_: str, *, whole: bool = False) -> str:
    """The id as tables show it."""
    return id_ if whole else id_[:SHORT_ID]


def print_rows(
    rows: Sequence[Record],
    columns: Sequence[Column],
    *,
    form: str,
    quiet: bool = False,
    terminal: Terminal,
    sentences: str = "",
    identifier: str = "ID",
    headers: dict[str, str] | None = None,
) -> None:
    """Prints a list. `sentences` names the field that a narrow terminal wraps; `headers` are titles
    of fields that are no columns but may be asked for.
    """
    if quiet and not form:
        lines = [show(row[identifier]) for row in rows]
    elif form in ("", "table"):
        table = [[title for title, _ in columns]]
        table += [[_cell(row[field]) for _, field in columns] for row in rows]
        fields = [field for _, field in columns]
        lines = layout(
            table,
            width=terminal.width,
            sentences=fields.index(sentences) if sentences in fields else None,
        )
        if terminal.colour and lines:
            lines[0] = click.style(lines[0], bold=True)
    elif form == "json":
        lines = [to_json(dict(sorted(row.items()))) for row in rows]
    elif form == "yaml":
        lines = [to_yaml([_data(row) for row in rows]).rstrip("\n")] if rows else ["[]"]
    else:
        lines = _templated(rows, columns, form, headers or {})
    for line in lines:
        click.echo(line)


def _cell(value: Any) -> str:
    return show(value).replace("\n", " ")


def _data(row: Record) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not callable(value)}


def _templated(
    rows: Sequence[Record], columns: Sequence[Column], form: str, headers: dict[str, str]
) -> list[str]:
    is_table = form == "table" or form.startswith("table ")
    text = form[6:] if is_table else form
    for written, meant in _ESCAPES:
        text = text.replace(written, meant)
    template = Template(text)
    if not is_table:
        return [template.render(row) for row in rows]
    titles = {field: title for title, field in columns} | headers
    fields = rows[0].keys() if rows else titles.keys()
    header = Record(
        {
            field: _method_title(titles.get(field, _spaced(field)))
            if rows and callable(rows[0][field])
            else titles.get(field, _spaced(field))
            for field in fields
        }
    )
    return layout([template.render(row).split("\t") for row in (header, *rows)])


def _method_title(title: str) -> Any:
    return lambda *arguments: show(arguments[0]) if arguments else title


def _spaced(name: str) -> str:
    """The title of a field that is no column: "DesiredState" → "DESIRED STATE"."""
    letters = [
        f" {letter}" if letter.isupper() and i and not name[i - 1].isupper() else letter
        for i, letter in enumerate(name)
    ]
    return "".join(letters).upper()


def print_inspected(objects: Sequence[dict[str, Any]], *, form: str, known: frozenset[str]) -> None:
    """Prints whole objects: a JSON array, or one document or line per object."""
    if form in ("", "pretty-json"):
        click.echo(json.dumps(list(objects), indent=4, ensure_ascii=False))
    elif form == "json":
        for item in objects:
            click.echo(to_json(item))
    elif form == "yaml":
        click.echo(to_yaml(list(objects)), nl=False)
    else:
        for written, meant in _ESCAPES:
            form = form.replace(written, meant)
        template = Template(form, known=known)
        for item in objects:
            click.echo(template.render(item))


def to_yaml(value: Any) -> str:
    """YAML in block style, in the given order."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=False)
