"""Variables and labels of a service that stand elsewhere: in env_file and label_file, below the
service's own, and in the caller's environment.
"""

from __future__ import annotations

from pathlib import Path

from cli.compose import envfile, keys
from cli.compose.at import At
from cli.compose.mounts import absolute
from cli.compose.problems import Source
from cli.compose.shorts import Context, strings
from cli.compose.tree import FILE_TAG, Node


def add_variables(at: At, entries: dict[str, Node], context: Context) -> None:
    """Reads env_file and label_file below environment and labels, and gives variables without a
    value the caller's.
    """
    if (files := at.set_at("env_file")) is not None:
        reset = files.node.tag == "!reset"
        found, paths = ({}, []) if reset else _env_files(files, context)
        entries.pop("env_file")
        if paths is not None or files.node.tag:
            entries["env_file"] = files.node.made(list(paths or ()))  # printed, not read again
            entries["env_file"].tag = files.node.tag
        own = entries.get("environment")
        if own is None:
            entries["environment"] = files.node.made(dict(found))
        elif isinstance(own.value, dict):
            entries["environment"] = own.made({**found, **own.value})
            entries["environment"].tag = own.tag
    environment = entries.get("environment")
    if environment is not None and isinstance(environment.value, dict):
        resolved = {
            name: node.made(context.variables[name])
            if node.value is None and name in context.variables and node.tag != "!reset"
            else node
            for name, node in environment.value.items()
        }
        tag = environment.tag
        entries["environment"] = environment.made(resolved)
        entries["environment"].tag = tag
    if (files := at.set_at("label_file")) is not None:
        entries.pop("label_file", None)
        if files.node.tag:  # only tells merging that another file's are gone
            entries["label_file"] = files.node.made([])
            entries["label_file"].tag = "!reset"
        listed = strings(files, context) if files.node.tag != "!reset" else None
        found = {}
        for each in At(listed, files.path, at.report).elements() if listed is not None else ():
            found |= _env_file(each, each.text(), context, dotenv=True, required=True)
        own = entries.get("labels")
        given = own.value if own is not None and isinstance(own.value, dict) else {}
        entries["labels"] = files.node.made({**found, **given})


def _env_files(at: At, context: Context) -> tuple[dict[str, Node], list[Node] | None]:
    """The variables of the files, and the files' paths if all are in the short form."""
    listed = at.node if isinstance(at.node.value, list | dict) else strings(at, context)
    if listed is None:
        return {}, None
    if isinstance(listed.value, dict):
        at.fail("must be a string or a list, not a mapping", "write - path: FILE")
        return {}, None
    found: dict[str, Node] = {}
    paths: list[Node] | None = []
    here = context.project in (None, context.base)
    for each in At(listed, at.path, at.report).elements():
        if not isinstance(each.node.value, dict):
            name = each.text()
            path = name if here else absolute(name, context.base, context.home)
            if paths is not None:
                paths.append(each.node.made(path))
            found |= _env_file(each, name, context, dotenv=False, required=True)
            continue
        if not each.check_keys(keys.ENV_FILE, context="env_file"):
            continue
        paths = None
        path_at, required, form = (each.set_at(key) for key in ("path", "required", "format"))
        if path_at is None:
            each.lacks("path", "add path: FILE")
            continue
        dotenv = form is None or form.choice(("dotenv", "raw")) != "raw"
        must = required is None or required.truth()
        found |= _env_file(path_at, path_at.text(), context, dotenv=dotenv, required=must)
    return found, paths


def _env_file(
    at: At, name: str, context: Context, *, dotenv: bool, required: bool
) -> dict[str, Node]:
    if not name:
        at.fail("must not be empty")
        return {}
    path = Path(absolute(name, context.base, context.home))
    try:
        text = envfile.read_text(path)
    except FileNotFoundError:
        if required:
            at.fail(f"no such file: {path}", "create it, or write required: false in the long form")
        return {}
    except (OSError, ValueError) as error:
        at.fail(f"{path}: {getattr(error, 'strerror', None) or error}")
        return {}
    source = Source(str(path), text, order=at.node.source.order)
    parse = envfile.parse_dotenv if dotenv else envfile.parse_raw
    values = parse(source, context.variables, context.report)
    found = {key: at.node.made(value) for key, value in values.items()}
    for node in found.values():
        node.tag = FILE_TAG
    return found
