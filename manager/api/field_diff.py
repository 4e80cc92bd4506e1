"""What differs between two specs, field by field, for people.

`changes` walks two structs of the same type side by side. What it gives is in FieldChange's terms
(proto/swarm/v1/control.proto): a path of field names as in the spec, and the values as JSON, absent
where a field is not set. Elements of lists are told apart by what users tell them apart by (_KEYS,
_SETS, _PAIRS): an environment variable by its name, a mount by its target. An element that comes or
goes is one change; a message that comes or goes is one for each of its fields. Lists whose order is
their meaning (a command, name servers) are one value.

Absent, empty and the default are the same wherever the cluster treats them so (_DEFAULTS,
_ABSENT_MESSAGES), and so are sets in another order: a spec that came another way shows no
difference. `literal` turns that off, for when somebody asks why two specs are not the same.
Pure. Called by manager/api/plan.py.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec

from swarm.clock import SECOND_NS
from swarm.v1 import FieldChange, Message, Replicated, ServiceMode, UpdateConfig

TEXT_BYTES_MAX: Final = 64 * 1024  # of a file's content shown as text; else its digest is
DIGEST_DIGITS: Final = 12  # hex; enough to see that two contents differ
_SECRETS_DIR = "/run/secrets/"

Key = Callable[[Any], str]
Field = tuple[str, str]
"""A message's name and one of its fields."""


class _Absent:
    """Not set."""


ABSENT: Final = _Absent()
Difference = tuple[str, Any, Any]
"""Path, before, after; the values as JSON knows them, or ABSENT."""


def _generic_key(generic: Any) -> str:
    return f"{generic.kind}={generic.name}" if generic.name else str(generic.kind)


def _file_key(directory: str, name: str) -> Key:
    def key(reference: Any) -> str:
        file = reference.file.name if reference.file else getattr(reference, name)
        return str(file) if file.startswith("/") else f"{directory}{file}"

    return key


# Lists whose elements have a name.
_KEYS: dict[Field, Key] = {
    ("ContainerSpec", "mounts"): lambda m: str(m.target),
    ("ContainerSpec", "secrets"): _file_key(_SECRETS_DIR, "secret_name"),
    ("ContainerSpec", "configs"): _file_key("/", "config_name"),
    ("ContainerSpec", "ulimits"): lambda u: str(u.name),
    ("ContainerSpec", "devices"): lambda d: str(d.target or d.source),
    ("TaskSpec", "networks"): lambda n: str(n.target),
    ("EndpointSpec", "ports"): lambda p: f"{p.target_port}/{p.protocol or 'tcp'}",
    ("Resources", "generic"): _generic_key,
    ("Resources", "devices"): lambda d: ",".join(d.capabilities) or str(d.driver),
    ("ServiceSpec", "depends_on"): lambda d: str(d.service),
}
# What is put behind the name where two elements have the same.
_SECOND_KEYS: dict[Field, Key] = {
    ("EndpointSpec", "ports"): lambda p: str(p.published_port),
}
# Lists of words in which order and repetition mean nothing.
_SETS = frozenset(
    {
        ("ContainerSpec", "groups"),
        ("ContainerSpec", "hosts"),
        ("ContainerSpec", "capability_add"),
        ("ContainerSpec", "capability_drop"),
        ("ContainerSpec", "security_opt"),
        ("ContainerSpec", "expose"),
        ("ContainerSpec", "device_cgroup_rules"),
        ("Placement", "constraints"),
        ("NetworkAttachmentSpec", "aliases"),
    }
)
# Lists of "K=V", and "K" alone for a variable that is taken away: null.
_PAIRS = frozenset({("ContainerSpec", "env")})
# What a field means that is not set.
_DEFAULTS: dict[Field, Any] = {
    ("Replicated", "replicas"): 1,
    ("UpdateConfig", "failure_action"): "pause",
    ("UpdateConfig", "monitor_ns"): 5 * SECOND_NS,
    ("UpdateConfig", "order"): "stop-first",
    ("EndpointSpec", "mode"): "vip",
    ("PortConfig", "protocol"): "tcp",
    ("PortConfig", "publish_mode"): "ingress",
    ("RestartPolicy", "condition"): "any",
    ("RestartPolicy", "delay_ns"): 5 * SECOND_NS,
    ("RestartPolicy", "max_attempts"): 0,
    ("RestartPolicy", "window_ns"): 0,
    ("RestartPolicy", "max_delay_ns"): 300 * SECOND_NS,
    ("ContainerSpec", "stop_grace_period_ns"): 10 * SECOND_NS,
    ("TaskSpec", "docker_runtime"): "container",
    ("NetworkSpec", "ipv4"): True,
}
# What a message means that is absent.
_ABSENT_MESSAGES: dict[Field, Message] = {
    ("ServiceSpec", "mode"): ServiceMode(replicated=Replicated()),
    ("ServiceSpec", "update"): UpdateConfig(parallelism=1),
    ("ServiceSpec", "rollback"): UpdateConfig(parallelism=1),
}
# Zero says something other than not set, where the message is there.
_ZERO_COUNTS = frozenset({("UpdateConfig", "parallelism")})
# Messages that say something by being there.
_PRESENCE = frozenset({"Replicated", "Global", "ReplicatedJob", "GlobalJob"})
# Fields that hold an object's id in a stored spec; the caller has put a token of the object's
# content there (see plan.py), which is what is shown under this name.
_CONTENT: dict[Field, str] = {
    ("SecretReference", "secret_id"): "data",
    ("ConfigReference", "config_id"): "data",
}


def changes(before: Message, after: Message, *, literal: bool = False) -> tuple[FieldChange, ...]:
    """All differences, in order of path. Both are of the same type."""
    found = sorted(_struct("", before, after, literal=literal), key=lambda d: d[0])
    return tuple(change(path, old, new) for path, old, new in found)


def change(path: str, before: Any, after: Any) -> FieldChange:
    """One difference in the contract's form."""
    return FieldChange(path=path, before=_json(before), after=_json(after))


def shown_bytes(data: bytes) -> str:
    """Content for people: as text where it is some, else a digest of it."""
    if len(data) <= TEXT_BYTES_MAX:
        try:
            return data.decode()
        except UnicodeDecodeError:
            pass
    return f"sha256:{hashlib.sha256(data).hexdigest()[:DIGEST_DIGITS]} ({len(data)} bytes)"


def _json(value: Any) -> str | None:
    return None if value is ABSENT else msgspec.json.encode(value).decode()


# ---------------------------------------------------------------- walking


def _struct(
    path: str, before: Any, after: Any, *, literal: bool, unset: Any = None
) -> Iterator[Difference]:
    """Two messages, of which one may be absent; `unset`: what its absence means."""
    name = type(before if before is not None else after).__name__
    one_sided = before is None or after is None
    if one_sided and (literal or (name in _PRESENCE and unset is None)):
        yield path, _plain(before), _plain(after)
        return
    for field in (before if before is not None else after).__struct_fields__:
        here, inner = (name, field), f"{path}.{field}" if path else field
        old = None if before is None else getattr(before, field)
        new = None if after is None else getattr(after, field)
        if old == new or (not literal and _both_empty(old, new)):
            continue
        one = old if old is not None else new
        if isinstance(one, Message):
            means = getattr(unset, field) if unset is not None else _ABSENT_MESSAGES.get(here)
            yield from _struct(inner, old, new, literal=literal, unset=means)
        elif isinstance(one, dict):
            yield from _map(inner, old or {}, new or {})
        elif isinstance(one, tuple):
            yield from _list(inner, here, old or (), new or (), literal=literal)
        else:
            fallback = getattr(unset, field) if unset is not None else None
            was = fallback if before is None else old
            becomes = fallback if after is None else new
            if literal or _meaning(here, was) != _meaning(here, becomes):
                inner = f"{path}.{_CONTENT[here]}" if here in _CONTENT else inner
                yield inner, _shown(here, old), _shown(here, new)


def _both_empty(before: Any, after: Any) -> bool:
    return before in (None, ()) and after in (None, ())


def _meaning(here: Field, value: Any) -> Any:
    return _DEFAULTS.get(here) if _is_unset(here, value) else value


def _shown(here: Field, value: Any) -> Any:
    if _is_unset(here, value):
        return ABSENT
    return shown_bytes(value) if isinstance(value, bytes) else value


def _is_unset(here: Field, value: Any) -> bool:
    if value is None:
        return True
    return not value and here not in _ZERO_COUNTS and here not in _OPTIONAL


def _map(path: str, before: dict[str, str], after: dict[str, str]) -> Iterator[Difference]:
    for key in before.keys() | after.keys():
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if old != new:
            yield f"{path}[{key}]", old, new


def _list(
    path: str, here: Field, before: Sequence[Any], after: Sequence[Any], *, literal: bool
) -> Iterator[Difference]:
    if here in _PAIRS:
        found = list(_map(path, _pairs(before), _pairs(after)))
    elif here in _SETS:
        found = list(_map(path, {w: w for w in before}, {w: w for w in after}))
    elif here in _KEYS:
        found = list(_keyed(path, here, before, after, literal=literal))
    else:
        found = [(path, _plain(before), _plain(after))]
    if literal and not found:
        found = [(path, _plain(before), _plain(after))]  # the order alone
    yield from found


def _pairs(words: Sequence[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        out[name] = value if equals else None
    return out


def _keyed(
    path: str, here: Field, before: Sequence[Any], after: Sequence[Any], *, literal: bool
) -> Iterator[Difference]:
    old, new = _by_name(here, before, after)
    for name in old.keys() | new.keys():
        inner = f"{path}[{name}]"
        if name in old and name in new:
            yield from _struct(inner, old[name], new[name], literal=literal)
        else:
            yield inner, _plain(old.get(name)), _plain(new.get(name))


def _by_name(
    here: Field, before: Sequence[Any], after: Sequence[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The elements by name; by more of them where a name is not enough, at last by number."""
    name, second = _KEYS[here], _SECOND_KEYS.get(here)
    sides = (before, after)
    doubled = {n for side in sides for n, c in Counter(map(name, side)).items() if c > 1}
    out = []
    for side in sides:
        found: dict[str, Any] = {}
        for element in side:
            key = name(element)
            if key in doubled and second is not None:
                key = f"{key}:{second(element)}"
            number, base = 1, key
            while key in found:
                number += 1
                key = f"{base}#{number}"
            found[key] = element
        out.append(found)
    return out[0], out[1]


def _plain(value: Any) -> Any:
    """A message or list as JSON knows it, without what is not set, ids that people do not know and
    bytes.
    """
    if value is None or value == ():
        return ABSENT
    if isinstance(value, tuple):
        return [_plain(v) if isinstance(v, Message) else v for v in value]
    if not isinstance(value, Message):
        return value
    out = {}
    for field in value.__struct_fields__:
        here = (type(value).__name__, field)
        inner = getattr(value, field)
        if isinstance(inner, Message):
            out[field] = _plain(inner)
        elif here not in _CONTENT and not _is_unset(here, inner):
            out[field] = _plain(inner) if isinstance(inner, tuple) else _shown(here, inner)
    return out


def _optional_fields() -> Iterator[Field]:
    """Scalars with presence: zero is a value there."""
    for cls in Message.__subclasses__():
        for field in msgspec.structs.fields(cls):
            if field.default is None:
                yield cls.__name__, field.name


_OPTIONAL = frozenset(_optional_fields())
