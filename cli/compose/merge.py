"""Merging of several files, and of a service with what it extends: the specification's rules.

Works on trees in their one form (forms.py). Mappings merge by key, later values win, lists are
joined; ports, volumes, secrets and configs merge by what they publish, where they are mounted and
what they name; commands and healthcheck tests are replaced whole. A null over a mapping or a list
changes nothing. `!reset` removes what was there, `!override` replaces it.

Where the specification leaves room, Docker's ways are taken: joined lists repeat what is equal, and
the lists that merge by key are sorted. A network, volume, secret or config is from one place: an
external one replaces what was declared, and a file another file's content.
"""

from __future__ import annotations

from collections.abc import Callable

from cli.compose.tree import FILE_TAG, Node, Value

# Paths below a service, or below the root; "*" is any key.
_REPLACED = frozenset(
    (
        ("services", "*", "command"),
        ("services", "*", "entrypoint"),
        ("services", "*", "healthcheck", "test"),
        ("services", "*", "ulimits", "*"),
    )
)


# Of these a repeated entry would be claimed twice.
_ONCE = frozenset(
    (
        ("services", "*", "gpus"),
        ("services", "*", "deploy", "resources", "reservations", "devices"),
    )
)
_OBJECTS = frozenset((section, "*") for section in ("networks", "volumes", "secrets", "configs"))
_CONTENTS = ("file", "environment", "content")


def _scalar(node: Node, key: str) -> str:
    inner = node.value.get(key) if isinstance(node.value, dict) else None
    return "" if inner is None or inner.value is None else str(inner.value)


def _port_key(node: Node) -> tuple[str, ...]:
    """Numbers are padded, so that they sort as such."""
    if not isinstance(node.value, dict):
        return ("", str(node.value))
    protocol = _scalar(node, "protocol") or "tcp"
    published = _scalar(node, "published")
    if published in ("", "0"):
        return ("", _scalar(node, "target").zfill(5), protocol)
    return (published.zfill(5), protocol, _scalar(node, "host_ip"))


_KEYED: dict[tuple[str, ...], Callable[[Node], tuple[str, ...]]] = {
    ("services", "*", "ports"): _port_key,
    ("services", "*", "volumes"): lambda node: (_scalar(node, "target") or str(plain(node)),),
    ("services", "*", "secrets"): lambda node: (_scalar(node, "source"),),
    ("services", "*", "configs"): lambda node: (_scalar(node, "source"),),
    ("services", "*", "devices"): lambda node: (
        _scalar(node, "target") or _scalar(node, "source"),
    ),
    ("services", "*", "tmpfs"): lambda node: (str(node.value).partition(":")[0],),
    ("networks", "*", "ipam", "config"): lambda node: (_scalar(node, "subnet"),),
}
# Docker sorts these of a service that stands in two files, unless only the later one has them.
_SORTED = ("ports", "volumes", "secrets", "configs")


def merge(base: Node, over: Node, path: tuple[str, ...] = ()) -> Node:
    """`over` laid upon `base`. Associative, except where !reset or !override stand."""
    if over.tag in ("!override", "!reset") or base.tag == "!reset":
        return over
    if isinstance(base.value, dict) and isinstance(over.value, dict):
        if path in _OBJECTS:
            return _objects(base, over, path)
        if path == ("services", "*"):
            return _services(base, over, path)
        if path == ("services", "*", "logging") and _other_driver(base, over):
            return over
        return _maps(base, over, path)
    if isinstance(base.value, list) and isinstance(over.value, list) and path not in _REPLACED:
        return _lists(base, over, path)
    if over.value is None and isinstance(base.value, dict | list) and path not in _REPLACED:
        return base
    return over


def _other_driver(base: Node, over: Node) -> bool:
    drivers = _scalar(base, "driver"), _scalar(over, "driver")
    return bool(drivers[1]) and drivers[0] != drivers[1]


def _below(path: tuple[str, ...], key: str) -> tuple[str, ...]:
    # Names that users choose are the second level, and the keys of ulimits.
    return (*path, "*" if len(path) == 1 or path[-1:] == ("ulimits",) else key)


def _maps(base: Node, over: Node, path: tuple[str, ...]) -> Node:
    assert isinstance(base.value, dict)
    assert isinstance(over.value, dict)
    values = dict(base.value)
    keys = dict(base.keys or {})
    for key, node in over.value.items():
        values[key] = merge(values[key], node, _below(path, key)) if key in values else node
        if over.keys is not None and key in over.keys:
            keys[key] = over.keys[key]
    merged = over.made(dict(values))
    merged.keys = keys
    return merged


def _services(base: Node, over: Node, path: tuple[str, ...]) -> Node:
    merged = _maps(_without_files(base, over), over, path)
    assert isinstance(base.value, dict)
    assert isinstance(merged.value, dict)
    for key in _SORTED:
        given, found = base.value.get(key), merged.value.get(key)
        if given is None or given.value is None or found is None:
            continue
        if isinstance(found.value, list):
            ordered = found.made(sorted(found.value, key=_KEYED[*path, key]))  # stable
            ordered.tag = found.tag
            merged.value[key] = ordered
    return merged


def _without_files(base: Node, over: Node) -> Node:
    """The base without what its env_file and label_file brought in, where `over` takes those away
    or replaces them.
    """
    assert isinstance(base.value, dict)
    assert isinstance(over.value, dict)
    values = dict(base.value)
    for files, key in (("env_file", "environment"), ("label_file", "labels")):
        given, found = over.value.get(files), values.get(key)
        if given is None or given.tag not in ("!reset", "!override"):
            continue
        if found is not None and isinstance(found.value, dict):
            kept = {name: node for name, node in found.value.items() if node.tag != FILE_TAG}
            values[key] = found.made(dict(kept))
            values[key].keys, values[key].tag = found.keys, found.tag
    if values == base.value:
        return base
    node = base.made(dict(values))
    node.keys, node.tag = base.keys, base.tag
    return node


def _objects(base: Node, over: Node, path: tuple[str, ...]) -> Node:
    assert isinstance(base.value, dict)
    assert isinstance(over.value, dict)
    if _is_external(over):
        return over
    dropped: tuple[str, ...] = ()
    if any(over.value.get(key) is not None for key in _CONTENTS):
        dropped = ("external", *_CONTENTS, "driver", "driver_opts")
    elif over.value.get("driver") is not None:
        dropped = ("external", *_CONTENTS)
    lower = base.made({key: node for key, node in base.value.items() if key not in dropped})
    lower.keys = base.keys
    merged = _maps(lower, over, path)
    # What replaced an earlier declaration still does so after this merge.
    merged.tag = "!override" if _is_external(base) else base.tag
    return merged


def _is_external(node: Node) -> bool:
    found = node.value.get("external") if isinstance(node.value, dict) else None
    return found is not None and found.value not in (None, False) and found.tag != "!reset"


def _lists(base: Node, over: Node, path: tuple[str, ...]) -> Node:
    assert isinstance(base.value, list)
    assert isinstance(over.value, list)
    key_of = _KEYED.get(path)
    items: list[Node]
    if key_of is not None:
        later = {key_of(node) for node in over.value}
        items = [node for node in base.value if key_of(node) not in later] + over.value
    elif path in _ONCE:
        seen = {repr(plain(node)) for node in base.value}
        items = base.value + [node for node in over.value if repr(plain(node)) not in seen]
    else:
        items = base.value + over.value
    merged = over.made(items)
    merged.tag = base.tag
    return merged


def plain(node: Node) -> object:
    """The tree as plain Python values, for comparison."""
    value = node.value
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value


def settled(node: Node) -> Node:
    """The tree after all merging: what !reset removed is gone."""
    value: Value = node.value
    if isinstance(value, dict):
        kept = {key: settled(inner) for key, inner in value.items() if inner.tag != "!reset"}
        if all(kept.get(key) is inner for key, inner in value.items()):
            return node
        value = dict(kept)
    elif isinstance(value, list):
        items = [settled(inner) for inner in value if inner.tag != "!reset"]
        if len(items) == len(value) and all(a is b for a, b in zip(items, value, strict=True)):
            return node
        value = items
    else:
        return node
    result = node.made(value)
    result.keys = node.keys
    return result
