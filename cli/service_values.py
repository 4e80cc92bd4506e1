"""The values of `service create` and `service update`: ports, mounts, references, resources, in
Docker's short and long forms.

Each function takes what stands on the command line and returns the contract's struct; all raise
click.BadParameter with the value, what is wrong with it, and the accepted form.
"""

from __future__ import annotations

import csv
import difflib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swarm.quantities import parse_bytes
from swarm.v1 import (
    BindOptions,
    ConfigReference,
    CredentialSpec,
    DeviceMapping,
    Driver,
    FileTarget,
    GenericResource,
    Mount,
    NetworkAttachmentSpec,
    PortConfig,
    SecretReference,
    TmpfsOptions,
    Ulimit,
    VolumeOptions,
)

__all__ = [
    "CREDENTIAL_SPEC",
    "SWAP",
    "config_reference",
    "device",
    "env_file",
    "env_value",
    "extra_host",
    "generic_resources",
    "host_to_remove",
    "mount",
    "network",
    "ports",
    "secret_reference",
    "ulimit",
]

if TYPE_CHECKING:
    _SpecType = click.ParamType[CredentialSpec]
    _IntType = click.ParamType[int]
else:
    _SpecType = _IntType = click.ParamType  # generic from click 8.2 on

PORT_MAX = 65535
PORTS_MAX = 1000  # of one range; more is more likely a slip
_PORT_FORM = (
    "write 8080:80, 80, 8080-8090:80-90/udp, or published=8080,target=80,protocol=tcp,mode=host"
)
_MOUNT_TYPES = ("bind", "volume", "tmpfs", "npipe", "cluster", "image")
_TRUE, _FALSE = ("", "1", "true", "t", "yes", "on"), ("0", "false", "f", "no", "off")


def fail(option: str, value: str, message: str) -> click.BadParameter:
    """The error for one value."""
    return click.BadParameter(f"{value!r}: {message}.", param_hint=f"'{option}'")


def pairs(option: str, text: str, *, flags: Iterable[str] = ()) -> list[tuple[str, str]]:
    """The key=value pairs of a long form; `flags` may stand without a value."""
    try:
        words = next(csv.reader([text], strict=True), [])
    except csv.Error as error:
        raise fail(option, text, f"is not a list of key=value pairs ({error})") from None
    found = []
    for word in words:
        key, separator, value = word.strip().partition("=")
        key = key.strip().lower()
        if not key or not (separator or key in flags):
            raise fail(option, text, f"{word!r} is not key=value")
        found.append((key, value.strip()))
    return found


def unknown_key(option: str, text: str, key: str, accepted: Iterable[str]) -> click.BadParameter:
    """The error for a key that a long form does not have."""
    names = list(accepted)
    near = difflib.get_close_matches(key, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return fail(option, text, f"there is no key {key!r}{hint} (keys: {', '.join(names)})")


def boolean(option: str, text: str, key: str, value: str) -> bool:
    """A flag of a long form: `readonly`, `readonly=true`."""
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise fail(option, text, f"{key}={value} is neither true nor false")


# ------------------------------------------------------------------ ports


def ports(text: str, *, option: str = "--publish") -> tuple[PortConfig, ...]:
    """A published port or range, in either form."""
    return (_long_port(text, option),) if "=" in text else _short_ports(text, option)


def _long_port(text: str, option: str) -> PortConfig:
    values: dict[str, str] = {}
    names = {
        "target": "target",
        "target-port": "target",
        "published": "published",
        "published-port": "published",
        "protocol": "protocol",
        "mode": "mode",
        "host-ip": "host_ip",
        "host_ip": "host_ip",
        "name": "name",
    }
    for key, value in pairs(option, text):
        if key not in names:
            raise unknown_key(
                option, text, key, ("target", "published", "protocol", "mode", "host-ip", "name")
            )
        values[names[key]] = value
    if "target" not in values:
        raise fail(option, text, f"target is missing; {_PORT_FORM}")
    mode = values.get("mode", "ingress")
    if mode not in ("ingress", "host"):
        raise fail(option, text, f"mode {mode!r} is neither ingress nor host")
    host_ip = values.get("host_ip", "")
    if host_ip:
        _address(option, text, host_ip)
        if mode != "host":
            raise fail(option, text, "host-ip is for mode=host; the mesh listens on all addresses")
    return PortConfig(
        name=values.get("name", ""),
        protocol=_protocol(option, text, values.get("protocol", "tcp")),
        target_port=_port(option, text, values["target"]),
        published_port=_port(option, text, values["published"]) if "published" in values else 0,
        publish_mode=mode,
        host_ip=host_ip,
    )


def _short_ports(text: str, option: str) -> tuple[PortConfig, ...]:
    body, slash, protocol = text.partition("/")
    protocol = _protocol(option, text, protocol if slash else "tcp")
    published, separator, target = body.rpartition(":")
    if ":" in published or "]" in published:
        raise fail(
            option,
            text,
            "an address is not possible in this form: the mesh listens on all of a node's; for one "
            "address write published=8080,target=80,mode=host,host-ip=10.0.0.1",
        )
    targets = _range(option, text, target)
    publisheds = _range(option, text, published) if separator and published else range(0)
    if publisheds and len(publisheds) != len(targets):
        raise fail(
            option, text, f"{len(publisheds)} published ports for {len(targets)} target ports"
        )
    return tuple(
        PortConfig(
            protocol=protocol,
            target_port=port,
            published_port=publisheds[i] if publisheds else 0,
            publish_mode="ingress",
        )
        for i, port in enumerate(targets)
    )


def _range(option: str, text: str, part: str) -> range:
    first, dash, last = part.partition("-")
    start = _port(option, text, first)
    end = _port(option, text, last) if dash else start
    if end < start:
        raise fail(option, text, f"the range {part} ends before it begins")
    if end - start >= PORTS_MAX:
        raise fail(option, text, f"{end - start + 1} ports are more than {PORTS_MAX}")
    return range(start, end + 1)


def _port(option: str, text: str, part: str) -> int:
    if not part.isdecimal() or not 0 < int(part) <= PORT_MAX:
        raise fail(option, text, f"{part!r} is not a port from 1 to {PORT_MAX}; {_PORT_FORM}")
    return int(part)


def _protocol(option: str, text: str, protocol: str) -> str:
    if protocol.lower() not in ("tcp", "udp", "sctp"):
        raise fail(option, text, f"protocol {protocol!r} is not one of tcp, udp, sctp")
    return protocol.lower()


def _address(option: str, text: str, address: str) -> str:
    try:
        return str(ipaddress.ip_address(address.strip("[]")))
    except ValueError:
        raise fail(option, text, f"{address!r} is not an IP address") from None


# ------------------------------------------------------------------ mounts

_MOUNT_FLAGS = ("readonly", "ro", "bind-nonrecursive", "volume-nocopy", "bind-create-src")
_MOUNT_KEYS = (
    "type",
    "source",
    "target",
    "readonly",
    "consistency",
    "bind-propagation",
    "bind-nonrecursive",
    "bind-recursive",
    "bind-create-src",
    "volume-nocopy",
    "volume-label",
    "volume-driver",
    "volume-opt",
    "volume-subpath",
    "tmpfs-size",
    "tmpfs-mode",
)
_MOUNT_ALIASES = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}


def mount(text: str, *, option: str = "--mount") -> Mount:
    """`type=bind,source=/a,target=/b,readonly`; the type is volume unless given."""
    single: dict[str, str] = {}
    many: dict[str, list[str]] = {"volume-label": [], "volume-opt": []}
    for given, value in pairs(option, text, flags=_MOUNT_FLAGS):
        key = _MOUNT_ALIASES.get(given, given)
        if key not in _MOUNT_KEYS:
            raise unknown_key(option, text, key, _MOUNT_KEYS)
        if key in many:
            many[key].append(value)
        else:
            single[key] = value
    kind = single.get("type", "volume").lower()
    if kind not in _MOUNT_TYPES:
        raise fail(option, text, f"type {kind!r} is not one of {', '.join(_MOUNT_TYPES)}")
    source, target = single.get("source", ""), single.get("target", "")
    _check_mount(option, text, kind, source, target, set(single) | {k for k in many if many[k]})
    return Mount(
        type=kind,
        source=source,
        target=target,
        read_only="readonly" in single and boolean(option, text, "readonly", single["readonly"]),
        consistency=single.get("consistency", ""),
        bind_options=_bind(option, text, single),
        volume_options=_volume(option, text, single, many),
        tmpfs_options=_tmpfs(option, text, single),
    )


def _check_mount(
    option: str, text: str, kind: str, source: str, target: str, keys: set[str]
) -> None:
    if not target:
        raise fail(option, text, "target is missing; write type=volume,source=data,target=/data")
    if not target.startswith("/"):
        raise fail(option, text, f"target {target!r} is not an absolute path")
    if kind == "bind" and not source.startswith("/"):
        what = f"source {source!r} is not an absolute path" if source else "source is missing"
        raise fail(option, text, f"{what}; a bind mount names a path on the node")
    if kind == "tmpfs" and source:
        raise fail(option, text, "a tmpfs mount has no source")
    for prefix in ("bind", "volume", "tmpfs"):
        stray = sorted(key for key in keys if key.startswith(f"{prefix}-"))
        if stray and kind != prefix and not (prefix == "volume" and kind == "cluster"):
            raise fail(option, text, f"{stray[0]} is for type={prefix}, not for {kind}")


def _bind(option: str, text: str, given: Mapping[str, str]) -> BindOptions | None:
    if not any(key.startswith("bind-") for key in given):
        return None
    recursive = given.get("bind-recursive", "")
    accepted = ("", "enabled", "disabled", "writable", "readonly")
    if recursive not in accepted:
        raise fail(option, text, f"bind-recursive {recursive!r} is not one of {accepted[1:]}")
    propagation = given.get("bind-propagation", "")
    modes = ("", "private", "rprivate", "shared", "rshared", "slave", "rslave")
    if propagation not in modes:
        raise fail(option, text, f"bind-propagation {propagation!r} is not one of {modes[1:]}")
    flag = {
        key: key in given and boolean(option, text, key, given[key])
        for key in ("bind-nonrecursive", "bind-create-src")
    }
    return BindOptions(
        propagation=propagation,
        non_recursive=flag["bind-nonrecursive"] or recursive == "disabled",
        create_mountpoint=flag["bind-create-src"],
        read_only_non_recursive=recursive == "writable",
        read_only_force_recursive=recursive == "readonly",
    )


def _volume(
    option: str, text: str, given: Mapping[str, str], many: Mapping[str, list[str]]
) -> VolumeOptions | None:
    driver = given.get("volume-driver", "")
    if not (
        many["volume-label"] or many["volume-opt"] or any(k.startswith("volume-") for k in given)
    ):
        return None

    def table(key: str) -> dict[str, str]:
        return dict(item.partition("=")[::2] for item in many[key])

    config = None
    if driver or many["volume-opt"]:
        config = Driver(name=driver, options=table("volume-opt"))
    no_copy = "volume-nocopy" in given and boolean(
        option, text, "volume-nocopy", given["volume-nocopy"]
    )
    return VolumeOptions(
        no_copy=no_copy,
        labels=table("volume-label"),
        driver_config=config,
        subpath=given.get("volume-subpath", ""),
    )


def _tmpfs(option: str, text: str, given: Mapping[str, str]) -> TmpfsOptions | None:
    if not ("tmpfs-size" in given or "tmpfs-mode" in given):
        return None
    try:
        size = parse_bytes(given["tmpfs-size"]) if "tmpfs-size" in given else 0
    except ValueError as error:
        raise fail(option, text, f"tmpfs-size: {error}") from None
    return TmpfsOptions(
        size_bytes=size,
        mode=_mode(option, text, given["tmpfs-mode"]) if "tmpfs-mode" in given else 0,
    )


def _mode(option: str, text: str, mode: str) -> int:
    try:
        value = int(mode, 8)
    except ValueError:
        value = -1
    if not 0 <= value <= 0o7777:
        raise fail(option, text, f"mode {mode!r} is not an octal number such as 0440")
    return value


# ------------------------------------------------------------------ secrets and configs


def secret_reference(text: str, *, option: str = "--secret") -> SecretReference:
    """`name`, or `source=name,target=file,uid=0,gid=0,mode=0444`; the id is filled in later."""
    source, file = _reference(text, option, prefix="")
    return SecretReference(secret_name=source, file=file)


def config_reference(text: str, *, option: str = "--config") -> ConfigReference:
    """As a secret; the default target is /name."""
    source, file = _reference(text, option, prefix="/")
    return ConfigReference(config_name=source, file=file)


def _reference(text: str, option: str, *, prefix: str) -> tuple[str, FileTarget]:
    given = {"source": text}
    if "=" in text:
        given = {}
        names = {"source": "source", "src": "source", "target": "target", "dst": "target"}
        names |= {"destination": "target", "uid": "uid", "gid": "gid", "mode": "mode"}
        for key, value in pairs(option, text):
            if key not in names:
                raise unknown_key(option, text, key, ("source", "target", "uid", "gid", "mode"))
            given[names[key]] = value
    source = given.get("source", "")
    if not source:
        raise fail(option, text, "source is missing; write NAME or source=NAME,target=FILE")
    for key in ("uid", "gid"):
        if not given.get(key, "0").isdecimal():
            raise fail(option, text, f"{key} {given[key]!r} is not a number")
    return source, FileTarget(
        name=given.get("target") or f"{prefix}{source}",
        uid=given.get("uid", "0"),
        gid=given.get("gid", "0"),
        mode=_mode(option, text, given.get("mode", "0444")),
    )


# ------------------------------------------------------------------ the small ones


class _CredentialSpec(_SpecType):
    name = "spec"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> CredentialSpec:
        if isinstance(value, CredentialSpec):
            return value
        kind, separator, rest = str(value).partition("://")
        if not separator or not rest or kind not in ("config", "file", "registry"):
            self.fail(f"{value!r}: write config://NAME, file://PATH or registry://KEY.", param, ctx)
        return CredentialSpec(**{kind: rest})


class _Swap(_IntType):
    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int) or value == "-1":
            return int(value)
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(f"{error}, or -1 for no limit.", param, ctx)


CREDENTIAL_SPEC = _CredentialSpec()
SWAP = _Swap()


def device(text: str, *, option: str = "--device") -> DeviceMapping:
    """`/dev/x[:/dev/y[:rwm]]`, or a CDI name."""
    if not text.startswith("/"):
        if "/" in text and "=" in text:
            return DeviceMapping(source=text, target=text)
        raise fail(
            option, text, "write /dev/x[:/dev/y[:rwm]], or a CDI name: vendor.com/class=name"
        )
    source, *rest = text.split(":")
    permissions = rest.pop() if rest and not rest[-1].startswith("/") else "rwm"
    target = rest.pop() if rest else source
    if rest or not permissions or not set(permissions) <= set("rwm"):
        raise fail(option, text, "write /dev/x[:/dev/y[:rwm]]")
    return DeviceMapping(source=source, target=target, permissions=permissions)


def network(text: str, *, option: str = "--network") -> NetworkAttachmentSpec:
    """`name`, or `name=net,alias=web,driver-opt=k=v,ip=10.0.0.5`."""
    if "=" not in text:
        return NetworkAttachmentSpec(target=text)
    name, aliases, options = "", [], {}
    addresses = {"ip": "", "ip6": ""}
    for key, value in pairs(option, text):
        match key:
            case "name":
                name = value
            case "alias":
                aliases.append(value)
            case "driver-opt":
                option_name, _, option_value = value.partition("=")
                options[option_name] = option_value
            case "ip" | "ip6":
                addresses[key] = _address(option, text, value)
            case _:
                raise unknown_key(option, text, key, ("name", "alias", "driver-opt", "ip", "ip6"))
    if not name:
        raise fail(option, text, "name is missing; write NAME or name=NAME,alias=ALIAS")
    return NetworkAttachmentSpec(
        target=name,
        aliases=tuple(aliases),
        driver_opts=options,
        ipv4_address=addresses["ip"],
        ipv6_address=addresses["ip6"],
    )


def generic_resources(texts: Iterable[str], *, option: str) -> tuple[GenericResource, ...]:
    """`gpu=2`, or `gpu=UUID1` for a named one."""
    found = []
    for text in texts:
        for part in text.split(","):
            kind, separator, value = part.partition("=")
            if not kind or not separator or not value:
                raise fail(option, text, "write KIND=NUMBER or KIND=NAME, such as gpu=2")
            if value.isdecimal():
                if int(value) == 0:
                    raise fail(option, text, f"0 of {kind} can never be given; ask for 1 or more")
                found.append(GenericResource(kind=kind, count=int(value)))
            else:
                found.append(GenericResource(kind=kind, name=value))
    kinds = {(resource.kind, resource.count is None) for resource in found}
    if len({kind for kind, _ in kinds}) < len(kinds):
        raise fail(option, ",".join(texts), "one kind cannot be both counted and named")
    return tuple(found)


def ulimit(text: str, *, option: str = "--ulimit") -> Ulimit:
    """`nofile=1024`, `nofile=1024:2048`; -1 is no limit."""
    name, separator, value = text.partition("=")
    match = re.fullmatch(r"(-1|\d+)(?::(-1|\d+))?", value)
    if not name or not separator or match is None:
        raise fail(option, text, "write NAME=SOFT[:HARD], such as nofile=1024:2048")
    soft = int(match[1])
    hard = int(match[2]) if match[2] else soft
    if hard != -1 and (soft == -1 or soft > hard):
        raise fail(option, text, "the soft limit is above the hard limit")
    return Ulimit(name=name, soft=soft, hard=hard)


def extra_host(text: str, *, option: str = "--host") -> str:
    """`name:ip`, given back as a line of /etc/hosts: "ip name"."""
    name, separator, address = text.replace("=", ":", 1).partition(":")
    if not name or not separator:
        raise fail(option, text, "write NAME:IP, such as db:10.0.0.5")
    if address == "host-gateway":
        return f"{address} {name}"
    return f"{_address(option, text, address)} {name}"


def host_to_remove(text: str) -> tuple[str, str]:
    """`name:ip`, or `name` alone for all of its addresses (""), as `--host-rm` takes them."""
    name, separator, _ = text.replace("=", ":", 1).partition(":")
    if name and not separator:
        return name, ""
    address, _, host = extra_host(text, option="--host-rm").partition(" ")
    return host, address


def env_value(text: str, environment: Mapping[str, str], *, option: str = "--env") -> str:
    """`K=V`; `K` alone takes the caller's value where there is one."""
    key, separator, _ = text.partition("=")
    if not key:
        raise fail(option, text, "the name is empty; write NAME=VALUE or NAME")
    if separator or key not in environment:
        return text
    return f"{key}={environment[key]}"


def env_file(path: str, environment: Mapping[str, str]) -> list[str]:
    """The variables of a file: one a line, # begins a comment."""
    option = "--env-file"
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        raise fail(option, path, "there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise fail(option, path, f"cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        text = line.lstrip().lstrip("\ufeff") if number == 1 else line.lstrip()
        if not text or text.startswith("#"):
            continue
        name = text.partition("=")[0]
        if not name or re.search(r"\s", name):
            raise fail(option, f"{path}:{number}", f"{name!r} is not a variable's name")
        if "=" in text or name in environment:
            found.append(env_value(text, environment, option=option))
    return found
