"""One form for everything: a service's short forms written out, so that merging and conversion see
one shape each.

Lists of K=V become mappings, one string becomes a list, ports and volumes take their long forms,
host paths become absolute against the folder of the file, and files of variables and labels are
read. Values keep the place they came from. Only shapes are decided here; what a value means is
convert's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cli.compose import envfile, keys
from cli.compose.at import At, go_float, made
from cli.compose.mounts import absolute, long_mounts
from cli.compose.ports import long_ports
from cli.compose.problems import Report, Source
from cli.compose.tree import FILE_TAG, LITERAL_TAG, Node, Value
from cli.compose.words import split_words


@dataclass(frozen=True, slots=True)
class Context:
    """What the forms depend on. `base` is the folder that relative paths start from; `variables`
    is the environment with .env below it.
    """

    base: Path
    variables: Mapping[str, str]
    report: Report
    project: Path | None = None  # what the written form's paths start from; by default `base`

    @property
    def home(self) -> str:
        return self.variables.get("HOME", "")


_DEPLOY_PARTS: tuple[tuple[tuple[str, ...], Mapping[str, keys.Key]], ...] = (
    (("placement",), keys.PLACEMENT),
    (("resources",), keys.RESOURCES),
    (("resources", "limits"), keys.LIMITS),
    (("resources", "reservations"), keys.RESERVATIONS),
    (("restart_policy",), keys.RESTART),
    (("update_config",), keys.UPDATE),
    (("rollback_config",), keys.UPDATE),
)


def canonical_service(at: At, context: Context) -> Node | None:
    """The service with every key in its one form; None if it is no mapping."""
    if not at.check_keys(keys.SERVICE, context="a service", refused=False):
        return None
    assert isinstance(at.node.value, dict)
    entries: dict[str, Node] = {}
    for key, value in at.items():
        known = keys.SERVICE.get(key)
        if known is None and not key.startswith("x-"):
            continue
        if value.node.tag == "!reset":
            entries[key] = value.node
            continue
        form = _FORMS.get(key)
        if form is None or value.node.value is None:
            # Nothing is what an absent key says; over another file's command it takes that away.
            entries[key] = value.node
            continue
        made_node = form(value, context)
        if made_node is not None:
            made_node.tag = value.node.tag
            entries[key] = made_node
    _variables(at, entries, context)
    node = at.node.made(dict(entries))
    node.keys = at.node.keys
    node.tag = at.node.tag
    return node


def pairs(at: At, context: Context | None = None) -> Node | None:
    """A mapping, or a list of K=V; K alone has no value."""
    del context
    if isinstance(at.node.value, dict):
        return at.node
    if not isinstance(at.node.value, list):
        at.fail(f"must be a mapping or a list of NAME=value, not {at.shown()}")
        return None
    values: dict[str, Node] = {}
    for entry in at.elements():
        if isinstance(entry.node.value, dict) and len(entry.node.value) == 1:
            (name,) = entry.node.value
            entry.fail("must be a string, not a mapping", f"write - {name}=value, without a space")
            continue
        name, equals, value = entry.text().partition("=")
        if not name.strip():
            entry.fail("a name is missing", "write NAME=value")
            continue
        values[name] = entry.node.made(value if equals else None)
    return at.node.made(dict(values))


def strings(at: At, context: Context) -> Node | None:
    """One string, or a list of them."""
    del context
    if isinstance(at.node.value, list):
        return at.node
    if isinstance(at.node.value, dict | bool | None):
        at.fail(f"must be a string or a list of strings, not {at.shown()}")
        return None
    return at.node.made([at.node])


def _exposed(at: At, context: Context) -> Node | None:
    """Ports; of a number its value, as Docker has it: 0x50 is 80."""
    listed = strings(at, context)
    if listed is None:
        return None
    ports = At(listed, at.path, at.report).elements()
    return at.node.made([_number_as_text(each.node) for each in ports])


def _number_as_text(node: Node) -> Node:
    match node.value:
        case int() if not isinstance(node.value, bool):
            return node.made(str(node.value))
        case float():
            return node.made(go_float(node.value))
    return node


def _words(at: At, context: Context) -> Node | None:
    """A command: a list, or a line that is split into words."""
    del context
    if isinstance(at.node.value, list):
        return at.node
    if isinstance(at.node.value, dict | bool):
        at.fail(f"must be a string or a list of strings, not {at.shown()}")
        return None
    if at.node.value is None:
        return at.node
    try:
        words = split_words(at.text())
    except ValueError as error:
        at.fail(
            f"the line cannot be split into words: {error}",
            "close the quote, or write the command as a list",
        )
        return None
    return at.node.made([at.node.made(word) for word in words])


def _named(at: At, context: Context) -> Node | None:
    """Networks: a mapping by name, or a list of names."""
    del context
    if isinstance(at.node.value, dict):
        for _, value in at.items():
            if value.node.value is not None:
                value.check_keys(keys.SERVICE_NETWORK, context="networks of a service")
        return at.node
    if not at.is_list("- NAME"):
        return None
    return at.node.made({each.text(): each.node.made(None) for each in at.elements()})


def _dependencies(at: At, context: Context) -> Node | None:
    del context
    if isinstance(at.node.value, dict):
        for _, value in at.items():
            if value.node.value is not None:
                value.check_keys(keys.DEPENDENCY, context="depends_on")
        return at.node
    if not at.is_list("- OTHER_SERVICE"):
        return None
    return at.node.made(
        {each.text(): made(each.node, {"condition": "service_started"}) for each in at.elements()}
    )


def _references(at: At, context: Context) -> Node | None:
    """Secrets and configs: names, or mappings with a source."""
    del context
    if not at.is_list("- NAME"):
        return None
    found: list[Node] = []
    for entry in at.elements():
        if isinstance(entry.node.value, dict):
            if entry.check_keys(keys.FILE_REFERENCE, context="secrets and configs of a service"):
                if entry.set_at("source") is None:
                    entry.lacks("source", "add source: and the name of the object")
                else:
                    found.append(entry.node)
        elif name := entry.text():
            found.append(made(entry.node, {"source": name}))
    return at.node.made(found)


def _ports(at: At, context: Context) -> Node | None:
    del context
    return at.node.made(long_ports(at))


def _mounts(at: At, context: Context) -> Node | None:
    return at.node.made(long_mounts(at, context.base, context.home))


def _ulimits(at: At, context: Context) -> Node | None:
    del context
    if not at.is_map("nofile: 65536, or nofile: {soft: 1024, hard: 65536}"):
        return None
    found: dict[str, Node] = {}
    for name, value in at.items():
        if isinstance(value.node.value, dict):
            value.check_keys(keys.ULIMIT, context="ulimits")
            found[name] = value.node
        else:
            number = value.integer(least=-1, what="a number, or {soft: 1024, hard: 65536}")
            found[name] = value.node if value.node.tag == LITERAL_TAG else value.node.made(number)
    node = at.node.made(dict(found))
    node.keys = at.node.keys
    return node


_HOST = re.compile(r"([^:=\s]+)\s*[:=]\s*(\S+)")


def _hosts(at: At, context: Context) -> Node | None:
    """Lines HOST:IP in the order of the file; of a mapping, sorted."""
    del context
    found: list[Node] = []
    if isinstance(at.node.value, dict):
        for name, value in sorted(at.items()):
            addresses = value.elements() if isinstance(value.node.value, list) else [value]
            for each in addresses:
                if each.node.value is None:
                    each.refuse("a host without an address", f'write {name}: "10.0.0.1"')
                else:
                    found.append(each.node.made(f"{name}:{_address(each.text())}"))
        return at.node.made(found)
    if not at.is_list('- "name:10.0.0.1"'):
        return None
    for entry in at.elements():
        text = entry.text()
        match = _HOST.fullmatch(text.strip())
        if match is not None:
            found.append(entry.node.made(f"{match[1]}:{_address(match[2])}"))
            continue
        entry.refuse(f"{entry.shown()} is not a host and its address", 'write "name:10.0.0.1"')
        if "=" in text or ":" in text:
            found.append(entry.node.made(text.replace("=", ":", 1)))
    return at.node.made(found)


def _address(text: str) -> str:
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _healthcheck(at: At, context: Context) -> Node | None:
    del context
    if not at.check_keys(keys.HEALTHCHECK, context="healthcheck"):
        return None
    test = at.at("test")
    if test is None or not isinstance(test.node.value, str):
        return at.node
    assert isinstance(at.node.value, dict)
    words: Value = [test.node.made("CMD-SHELL"), test.node]
    node = made(at.node, {**at.node.value, "test": test.node.made(words)})
    node.keys = at.node.keys
    return node


def _logging(at: At, context: Context) -> Node | None:
    del context
    at.check_keys(keys.LOGGING, context="logging")
    return at.node


def _gpus(at: At, context: Context) -> Node | None:
    """all, a number, or a list of device claims."""
    del context
    if isinstance(at.node.value, list):
        return at.node
    if at.node.value == "all":
        count: Value = -1
    else:
        count = at.integer(least=1, what="write all, a number, or a list of device claims")
    return at.node.made([made(at.node, {"count": count})])


def _devices(at: At, context: Context) -> Node | None:
    del context
    if not at.is_list("- /dev/snd:/dev/snd"):
        return None
    found: list[Node] = []
    for entry in at.elements():
        if isinstance(entry.node.value, dict):
            if entry.check_keys(keys.DEVICE_MAPPING, context="devices"):
                found.append(entry.node)
            continue
        text = entry.text()
        if not text.startswith("/"):  # a CDI name, vendor.com/class=name, is its own target
            if "=" not in text or "/" not in text:
                entry.refuse(
                    f'"{text}" is not a device',
                    "write /dev/NAME, /dev/NAME:/dev/TARGET:rwm, or a CDI name such as "
                    "nvidia.com/gpu=0",
                )
            found.append(_written(made(entry.node, {"source": text}), text))
            continue
        source, _, rest = text.partition(":")
        target, _, permissions = rest.partition(":")
        if target and not target.startswith("/") and not permissions:
            target, permissions = "", target
        entries: dict[str, Value | Node] = {
            "source": source,
            "target": target or source,
            "permissions": permissions or "rwm",
        }
        found.append(_written(made(entry.node, entries), text))
    return at.node.made(found)


def _written(node: Node, text: str) -> Node:
    """Keeps the short form that a value was made of, for who prints it."""
    node.text = text
    return node


def _security(at: At, context: Context) -> Node | None:
    """Reads seccomp profiles: the engine takes a profile's content, a file names its path."""
    if not at.is_list("- no-new-privileges:true"):
        return None
    found: list[Node] = []
    for entry in at.elements():
        written = entry.text()
        match = re.fullmatch(r"seccomp[=:](.+)", written)
        if match is None or match[1] in ("unconfined", "builtin") or match[1].startswith("{"):
            found.append(entry.node)
            continue
        path = absolute(match[1], context.base, context.home)
        value = f"seccomp={path}"
        try:
            profile = json.loads(envfile.read_text(Path(path)))
        except FileNotFoundError:
            entry.refuse(f"no such file: {path}", "name a seccomp profile, or write unconfined")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            entry.refuse(f"{path} is no seccomp profile: {reason}", "a profile is a JSON file")
        else:
            value = f"seccomp={json.dumps(profile, separators=(',', ':'))}"
        found.append(_written(entry.node.made(value), written))
    return at.node.made(found)


def _deploy(at: At, context: Context) -> Node | None:
    if not at.check_keys(keys.DEPLOY, context="deploy"):
        return None
    for path, known in _DEPLOY_PARTS:
        part: At | None = at
        for key in path:
            part = part.set_at(key) if part is not None else None
        if part is not None:
            part.check_keys(known, context="deploy." + ".".join(path))
    labels = at.set_at("labels")
    if labels is None or isinstance(labels.node.value, dict):
        return at.node
    assert isinstance(at.node.value, dict)
    given = pairs(labels, context)
    entries: dict[str, Value | Node] = {**at.node.value, "labels": given or at.node.made({})}
    node = made(at.node, entries)
    node.keys = at.node.keys
    return node


def _build(at: At, context: Context) -> Node | None:
    """Never built here, but printed: the short form is the context."""
    if isinstance(at.node.value, str):
        return made(at.node, {"context": at.node})
    if not at.is_map("context: ."):
        return None
    assert isinstance(at.node.value, dict)
    entries: dict[str, Value | Node] = dict(at.node.value)
    for key, form in (("args", pairs), ("labels", pairs), ("extra_hosts", _hosts)):
        if (found := at.set_at(key)) is not None:
            entries[key] = form(found, context) or found.node.made({})
    if (found := at.set_at("cache_from")) is not None:
        entries["cache_from"] = strings(found, context) or found.node.made([])
    return made(at.node, entries)


_FORMS: dict[str, Callable[[At, Context], Node | None]] = {
    "annotations": pairs,
    "build": _build,
    "cap_add": strings,
    "cap_drop": strings,
    "command": _words,
    "configs": _references,
    "depends_on": _dependencies,
    "deploy": _deploy,
    "devices": _devices,
    "dns": strings,
    "dns_opt": strings,
    "dns_search": strings,
    "entrypoint": _words,
    "environment": pairs,
    "expose": _exposed,
    "extra_hosts": _hosts,
    "gpus": _gpus,
    "healthcheck": _healthcheck,
    "labels": pairs,
    "logging": _logging,
    "networks": _named,
    "ports": _ports,
    "secrets": _references,
    "security_opt": _security,
    "storage_opt": pairs,
    "sysctls": pairs,
    "tmpfs": strings,
    "ulimits": _ulimits,
    "volumes": _mounts,
}


def _variables(at: At, entries: dict[str, Node], context: Context) -> None:
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
