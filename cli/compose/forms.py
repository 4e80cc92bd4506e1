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
from pathlib import Path

from cli.compose import envfile, keys
from cli.compose.at import At, made, with_value
from cli.compose.mounts import absolute, long_mounts
from cli.compose.ports import long_ports
from cli.compose.shorts import Context, numbers, pairs, strings, words
from cli.compose.tree import LITERAL_TAG, Node, Value
from cli.compose.variables import add_variables

_DEPLOY_PARTS: tuple[tuple[tuple[str, ...], Mapping[str, keys.Key]], ...] = (
    (("job",), keys.JOB),
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
    add_variables(at, entries, context)
    node = at.node.made(dict(entries))
    node.keys = at.node.keys
    node.tag = at.node.tag
    return node


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
    return with_value(at, "test", test.node.made([test.node.made("CMD-SHELL"), test.node]))


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
    del context
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
    return with_value(at, "labels", pairs(labels) or at.node.made({}))


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
    "command": words,
    "configs": _references,
    "depends_on": _dependencies,
    "deploy": _deploy,
    "devices": _devices,
    "dns": strings,
    "dns_opt": strings,
    "dns_search": strings,
    "entrypoint": words,
    "environment": pairs,
    "expose": numbers,
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
