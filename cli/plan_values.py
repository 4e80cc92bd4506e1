"""Values of a plan in compose's words: durations, sizes, commands, elements of lists in one line.

Values are what JSON knows, and may have a form that this version has not heard of: whatever comes
is shown somehow, never an error.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import msgspec

from swarm import gpus
from swarm.errors import Invalid
from swarm.quantities import format_cpus, format_duration
from swarm.v1 import DeviceRequest, Resources

__all__ = [
    "Format",
    "claim",
    "dependency",
    "device",
    "file",
    "limit",
    "mount",
    "octal",
    "plain",
    "port",
    "size",
    "with_unit",
    "words",
]

Format = Callable[[Any], str]
_FILE_MODE = 0o444  # of secrets and configs where nothing else is said
# Endings of our field names, which carry their unit, and what compose has no unit for.
_UNITS: tuple[tuple[str, Format], ...] = (
    ("_ns", lambda value: format_duration(value)),
    ("_bytes", lambda value: size(value)),
    ("_nano", lambda value: format_cpus(value)),
)
_RENAMED = {"cpu": "cpus"}


def size(value: int) -> str:
    """Bytes as compose writes them, exactly: "512M", "1536K", "1000"."""
    for unit, bytes_ in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if value and value % bytes_ == 0:
            return f"{value // bytes_}{unit}"
    return str(value)


def plain(value: Any) -> str:
    """A value in YAML's flow style, without needless quotes."""
    match value:
        case bool():
            return "true" if value else "false"
        case None:
            return "null"
        case str():
            return value
        case list():
            return f"[{', '.join(map(plain, value))}]"
        case dict():
            pairs = []
            for name, inner in value.items():
                key, form = with_unit(name, name, None)
                pairs.append(f"{key}: {form(inner) if form else plain(inner)}")
            return f"{{{', '.join(pairs)}}}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def with_unit(key: str, path: str, form: Format | None) -> tuple[str, Format | None]:
    """The compose key without our unit's name, and how its values are shown."""
    if form is not None:
        return key, form
    for ending, show in _UNITS:
        if path.endswith(ending):
            short = key.removesuffix(ending)
            stem, dot, last = short.rpartition(".")
            return f"{stem}{dot}{_RENAMED.get(last, last)}", _numbers(show)
    return key, None


def _numbers(show: Format) -> Format:
    return lambda value: show(value) if isinstance(value, int) else plain(value)


def words(value: Any) -> str:
    """A command: as a shell would read it."""
    return shlex.join(map(str, value)) if isinstance(value, list) else plain(value)


def octal(value: Any) -> str:
    return f"0o{value:03o}" if isinstance(value, int) else plain(value)


# Elements of lists that come or go, in one line each.


def port(value: Any) -> str:
    """ "8080->80/tcp"."""
    if not isinstance(value, dict):
        return plain(value)
    ip = f"{value['host_ip']}:" if value.get("host_ip") else ""
    published = value.get("published_port", "any")
    mode = ", mode host" if value.get("publish_mode") == "host" else ""
    return f"{ip}{published}->{value.get('target_port')}/{value.get('protocol', 'tcp')}{mode}"


def mount(value: Any) -> str:
    """ "data:/var/lib/data (volume, read only)"; what else is set follows."""
    if not isinstance(value, dict):
        return plain(value)
    rest = dict(value)
    source, target = rest.pop("source", ""), rest.pop("target", "")
    notes = [str(rest.pop("type", "volume"))]
    if rest.pop("read_only", False):
        notes.append("read only")
    notes += [plain({name: inner})[1:-1] for name, inner in rest.items()]
    return f"{f'{source}:' if source else ''}{target} ({', '.join(notes)})"


def file(value: Any) -> str:
    """ "password (uid: 99, mode: 0o440)": a secret or config, and how its file is not the usual."""
    if not isinstance(value, dict):
        return plain(value)
    name = value.get("secret_name") or value.get("config_name") or ""
    given = value.get("file")
    given = dict(given) if isinstance(given, dict) else {}
    notes = []
    if str(given.get("name", name)) != str(name):
        notes.append(f"target: {given['name']}")
    notes += [f"{key}: {given[key]}" for key in ("uid", "gid") if given.get(key, "0") != "0"]
    if given.get("mode", _FILE_MODE) != _FILE_MODE:
        notes.append(f"mode: {octal(given['mode'])}")
    return f"{name} ({', '.join(notes)})" if notes else str(name)


def limit(value: Any) -> str:
    if not isinstance(value, dict):
        return plain(value)
    soft, hard = value.get("soft", 0), value.get("hard", 0)
    return str(soft) if soft == hard else f"{soft}:{hard}"


def device(value: Any) -> str:
    if not isinstance(value, dict):
        return plain(value)
    names = ("source", "target", "permissions")
    return ":".join(str(value[name]) for name in names if value.get(name))


def claim(value: Any) -> str:
    """Of devices: GPUs in words, anything else as it is."""
    try:
        request = msgspec.convert(value, DeviceRequest)
        ask = gpus.ask_of(Resources(devices=(request,)))
    except (msgspec.ValidationError, Invalid):
        return plain(value)
    return str(ask) if ask is not None else plain(value)


def dependency(value: Any) -> str:
    if not isinstance(value, dict):
        return plain(value)
    notes = [] if value.get("required", False) else ["not required"]
    notes += ["restart"] if value.get("restart") else []
    return ", ".join([str(value.get("condition", "service_started")), *notes])
