"""The top level's networks, volumes, secrets and configs: what services may name, and the specs of
what the stack makes.

As in Docker, networks are made only when a service uses them, secrets and configs always; an
external object keeps its name and is only required to exist.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from cli.compose import keys
from cli.compose.around import NAMESPACE_LABEL, Declared
from cli.compose.at import At
from cli.compose.mounts import absolute
from cli.compose.shorts import Context, pairs
from swarm.quantities import format_bytes
from swarm.v1 import ConfigSpec, Driver, IpamConfig, IpamOptions, NetworkSpec, SecretSpec

SECRET_BYTES_MAX = 500 * 1024
CONFIG_BYTES_MAX = 1000 * 1024
DEFAULT_DRIVER = "overlay"
NETWORK_DRIVERS = ("overlay", "bridge")
ENGINE_NETWORKS = ("bridge", "host", "none", "default")  # every engine has them
_DATA_KEYS = ("file", "environment", "content")
_OBJECT_NAME = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,62}[a-zA-Z0-9])?")
_NETWORK_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")  # of volumes as well
_SECTIONS = {
    "networks": keys.NETWORK,
    "volumes": keys.VOLUME,
    "secrets": keys.SECRET,
    "configs": keys.CONFIG,
}


def canonical_section(at: At, context: Context) -> None:
    """Checks the keys of a section's entries, makes their labels mappings and their paths absolute,
    in place: entries belong to this file alone.
    """
    known = _SECTIONS[at.path.rpartition(".")[2]]
    for _, entry in at.items():
        if entry.node.value is None or entry.node.tag == "!reset":
            continue
        if not entry.check_keys(known, context=at.path):
            continue
        assert isinstance(entry.node.value, dict)
        for key in ("labels",):
            found = entry.set_at(key)
            if found is not None:
                entry.node.value[key] = pairs(found) or found.node.made({})
        file = entry.set_at("file")
        if file is not None and (name := file.text()):
            entry.node.value["file"] = file.node.made(absolute(name, context.base, context.home))


class Objects:
    """The declarations of one stack."""

    def __init__(self, stack: str, root: At, variables: Mapping[str, str]) -> None:
        self.stack = stack
        self.root = root
        self.variables = variables
        self.networks = self._declared("networks", self._labels)
        self.volumes = self._declared("volumes", self._labels)
        self.secrets = self._declared("secrets", self._labels)
        self.configs = self._declared("configs", self._labels)
        self.networks.setdefault("default", Declared(f"{stack}_default"))

    def _entries(self, section: str) -> list[tuple[str, At]]:
        found = self.root.set_at(section)
        return list(found.items()) if found is not None else []

    def _labels(self, at: At) -> dict[str, str]:
        labels = at.set_at("labels")
        own = labels.mapping() if labels is not None else {}
        return dict(sorted({**own, NAMESPACE_LABEL: self.stack}.items()))

    def _declared(
        self, section: str, labels: Callable[[At], dict[str, str]]
    ) -> dict[str, Declared]:
        found: dict[str, Declared] = {}
        for key, at in self._entries(section):
            name_at = at.set_at("name")
            name = name_at.text(empty=False) if name_at is not None else ""
            external, named = self._external(at, section)
            full = name or named or (key if external else f"{self.stack}_{key}")
            if section in ("secrets", "configs") and not _OBJECT_NAME.fullmatch(full):
                (name_at or at).fail(
                    f'"{full}" cannot be the name of a {section[:-1]}',
                    "use 1 to 64 of a-z, A-Z, 0-9, -, _ and ., the first and last a letter or "
                    "digit",
                )
            elif section == "volumes" and "{{" in full:
                pass  # a placeholder, filled in for each task
            elif not (external or "{{" in full or _NETWORK_NAME.fullmatch(full)):
                (name_at or at).fail(
                    f'"{full}" cannot be the name of a {section[:-1]}',
                    "use 1 to 128 of a-z, A-Z, 0-9, -, _ and ., the first a letter or digit",
                )
            found[key] = Declared(
                full_name=full,
                external=external,
                labels={} if external else labels(at),
                driver=self._driver(at) if section == "volumes" else None,
            )
        return found

    def _external(self, at: At, section: str) -> tuple[bool, str]:
        """Whether it is external, and the name of the old form external: {name: ...}."""
        found = at.set_at("external")
        if found is None:
            return False, ""
        name = ""
        if isinstance(found.node.value, dict):
            found.check_keys(keys.EXTERNAL, context="external")
            named = found.set_at("name")
            name = named.text() if named is not None else ""
            external = True
            if name and at.set_at("name") is not None:
                found.fail("the name is given twice", "keep name: and write external: true")
        else:
            external = found.truth()
        if external:
            for key, each in at.items():
                if key in ("external", "name") or key.startswith("x-"):
                    continue
                message = f'"{key}" has no effect on an external {section[:-1]}'
                if section == "networks":
                    # Many say again how the network was made, and Docker takes it.
                    each.warn(f"{message}, which is there already")
                else:
                    at.fail_key(key, message, "remove it, or remove external")
        return external, name

    def _driver(self, at: At) -> Driver | None:
        driver, options = at.set_at("driver"), at.set_at("driver_opts")
        if driver is None and options is None:
            return None
        return Driver(
            name=driver.text() if driver is not None else "",
            options=dict(sorted(options.mapping().items())) if options is not None else {},
        )

    # ------------------------------------------------------------------ specs

    def network_specs(self, used: frozenset[str]) -> tuple[NetworkSpec, ...]:
        """The networks to be made; `used` are the full names that services join."""
        places = dict(self._entries("networks"))
        specs = []
        for key, declared in self.networks.items():
            if declared.external:
                if declared.full_name in ("bridge", "docker_gwbridge", "ingress"):
                    places[key].fail(
                        f'services cannot join "{declared.full_name}"',
                        "name a network with driver: overlay, or host",
                    )
                continue
            at = places.get(key)
            spec = self._network(declared, at)
            if declared.full_name in used:
                specs.append(spec)
            elif at is not None and key != "default":
                at.warn("no service joins this network, so it is not made")
        return tuple(specs)

    def _network(self, declared: Declared, at: At | None) -> NetworkSpec:
        if at is None or not isinstance(at.node.value, dict):
            return NetworkSpec(
                name=declared.full_name,
                labels={NAMESPACE_LABEL: self.stack},
                driver=Driver(name=DEFAULT_DRIVER),
                scope="swarm",
            )

        def truth(key: str) -> bool:
            found = at.set_at(key)
            return found.truth() if found is not None else False

        driver = self._driver(at) or Driver()
        driver_at, name_at = at.set_at("driver"), at.set_at("name")
        if driver_at is not None and driver.name not in ("", *NETWORK_DRIVERS):
            driver_at.fail(
                f'the network driver "{driver.name}" is not offered',
                "write overlay, which reaches across hosts, or leave it out",
            )
        if name_at is not None and declared.full_name in ENGINE_NETWORKS:
            name_at.fail(
                f'"{declared.full_name}" is a network that every engine has',
                "choose another name, or write external: true to use that one",
            )
        ipv4, ipv6, ipam = at.set_at("enable_ipv4"), at.set_at("enable_ipv6"), at.set_at("ipam")
        options = self._ipam(ipam)
        has_ipv6 = any(":" in config.subnet for config in options.configs) if options else False
        if ipv6 is not None and truth("enable_ipv6") and not has_ipv6:
            ipv6.fail(
                "a network with IPv6 needs an IPv6 subnet",
                "add ipam: {config: [{subnet: 2001:db8:1::/64}]}",
            )
        if ipv4 is not None and not ipv4.truth() and not truth("enable_ipv6"):
            ipv4.fail("a network without IPv4 needs IPv6", "add enable_ipv6: true and a subnet")
        return NetworkSpec(
            name=declared.full_name,
            labels=dict(declared.labels),
            driver=Driver(name=driver.name or DEFAULT_DRIVER, options=driver.options),
            ipv6=truth("enable_ipv6"),
            internal=truth("internal"),
            attachable=truth("attachable"),
            ipam=options,
            scope="swarm",
            ipv4=ipv4.truth() if ipv4 is not None else None,
        )

    def _ipam(self, at: At | None) -> IpamOptions | None:
        if at is None or not at.check_keys(keys.IPAM, context="ipam"):
            return None
        driver, configs_at, options = at.set_at("driver"), at.set_at("config"), at.set_at("options")
        if driver is not None and driver.text() not in ("", "default"):
            driver.fail("other drivers of addresses are not offered", "write default, or remove it")
        configs: list[IpamConfig] = []
        if configs_at is not None and configs_at.is_list("- subnet: 10.20.0.0/24"):
            for each in configs_at.elements():
                if each.check_keys(keys.IPAM_CONFIG, context="ipam.config"):
                    config = self._ipam_config(each)
                    _refuse_overlap(each, config.subnet, configs)
                    configs.append(config)
        return IpamOptions(
            driver=Driver(
                name=driver.text() if driver is not None else "",
                options=options.mapping() if options is not None else {},
            ),
            configs=tuple(configs),
        )

    def _ipam_config(self, at: At) -> IpamConfig:
        network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
        values = {"subnet": "", "ip_range": "", "gateway": ""}
        for key in values:
            found = at.set_at(key)
            if found is None:
                continue
            values[key] = text = found.text(empty=False)
            try:
                if key == "gateway":
                    address = ipaddress.ip_address(text)
                    inside = network is None or address in network
                else:
                    net = ipaddress.ip_network(text, strict=key == "subnet")
                    inside = network is None or (
                        net.version == network.version
                        and net.network_address in network
                        and net.prefixlen >= network.prefixlen
                    )
                    network = network or net
            except ValueError:
                example = "10.20.0.1" if key == "gateway" else "10.20.0.0/24"
                found.fail(f'"{text}" is not a {key.replace("_", " ")}', f"for example {example}")
                continue
            if not inside:
                found.fail(f"{text} is not inside the subnet {network}", "choose one inside it")
        others = at.set_at("aux_addresses")
        for _, each in others.items() if others is not None else ():
            _check_inside(each, network)
        if network is None and at.set_at("subnet") is None and at.node.value:
            at.lacks("subnet", "add subnet: 10.20.0.0/24")
        return IpamConfig(
            subnet=values["subnet"],
            range=values["ip_range"],
            gateway=values["gateway"],
            aux_addresses=others.mapping() if others is not None else {},
        )

    def secret_specs(self) -> tuple[SecretSpec, ...]:
        specs = []
        for key, at in self._entries("secrets"):
            declared = self.secrets[key]
            if declared.external:
                continue
            if (driver := at.set_at("driver") or at.set_at("driver_opts")) is not None:
                driver.fail(
                    "drivers that bring secrets from elsewhere are not offered",
                    "write file:, environment: or content:, or external: true",
                )
                continue
            specs.append(
                SecretSpec(
                    name=declared.full_name,
                    labels=dict(declared.labels),
                    data=self._data(at, "secret", SECRET_BYTES_MAX),
                    templating=self._templating(at),
                )
            )
        return tuple(specs)

    def config_specs(self) -> tuple[ConfigSpec, ...]:
        return tuple(
            ConfigSpec(
                name=self.configs[key].full_name,
                labels=dict(self.configs[key].labels),
                data=self._data(at, "config", CONFIG_BYTES_MAX),
                templating=self._templating(at),
            )
            for key, at in self._entries("configs")
            if not self.configs[key].external
        )

    def _templating(self, at: At) -> Driver | None:
        found = at.set_at("template_driver")
        if found is None:
            return None
        return Driver(name=found.choice(("golang",)))

    def _data(self, at: At, kind: str, most: int) -> bytes:
        """The content, from exactly one of file, environment and content."""
        given = [key for key in _DATA_KEYS if at.set_at(key) is not None]
        if len(given) != 1:
            at.fail(
                f"{' and '.join(given)} exclude each other" if given else "it has no content",
                "write one of file: PATH, environment: VARIABLE, content: TEXT, or external: true",
            )
            return b""
        found = at.set_at(given[0])
        assert found is not None
        data = b""
        match given[0]:
            case "content":
                data = found.text().encode()
            case "environment":
                name = found.text(empty=False)
                if name and name not in self.variables:
                    found.fail(f"the variable {name} is not set", f"set it: {name}=...")
                    return b""
                data = self.variables.get(name, "").encode(errors="surrogateescape")
            case _:
                read = self._file(found, most)
                if read is None:
                    return b""
                data = read
        if len(data) > most:
            found.fail(
                f"the {kind} is larger than {format_bytes(most)}",
                "put large data on a volume",
            )
        elif not data and kind == "secret":
            found.fail("the secret is empty", "a secret needs at least one byte")
        return data

    def _file(self, at: At, most: int) -> bytes | None:
        name = at.text(empty=False)
        if not name:
            return None
        path = Path(name)
        try:
            with path.open("rb") as file:
                return file.read(most + 1)
        except FileNotFoundError:
            at.fail(f"no such file: {path}", "create it, or correct the path")
        except IsADirectoryError:
            at.fail(f"{path} is a folder", "name a file in it")
        except OSError as error:
            at.fail(f"{path} cannot be read: {error.strerror}", "check its permissions")
        return None


def _check_inside(at: At, network: ipaddress.IPv4Network | ipaddress.IPv6Network | None) -> None:
    try:
        inside = network is None or ipaddress.ip_address(at.text()) in network
    except ValueError:
        inside = False
    if not inside:
        at.fail(f"{at.shown()} is not an address of {network}", "choose one inside it")


def _refuse_overlap(at: At, subnet: str, others: list[IpamConfig]) -> None:
    mine = _network_of(subnet)
    for other in others:
        theirs = _network_of(other.subnet)
        if mine is None or theirs is None or mine.version != theirs.version:
            continue
        if mine.network_address in theirs or theirs.network_address in mine:
            at.fail_key("subnet", f"{mine} overlaps with {theirs}", "choose another subnet")


def _network_of(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False) if text else None
    except ValueError:
        return None
