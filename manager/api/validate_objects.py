"""What the specs of secrets, configs, networks, volumes, nodes and the cluster may say."""

from __future__ import annotations

import ipaddress

from manager.allocator import overlap
from manager.api.names import (
    PREDEFINED_NETWORKS,
    check_labels,
    check_network_name,
    check_secret_name,
)
from manager.api.problems import Finder
from manager.api.validate_placement import check_scheduling
from manager.ca import data_keys
from swarm.clock import SECOND_NS
from swarm.placeholders import CONFIG_BYTES_MAX, DRIVERS, SECRET_BYTES_MAX, payload_problem
from swarm.v1 import (
    Availability,
    Cluster,
    ClusterSpec,
    ConfigSpec,
    IpamConfig,
    NetworkSpec,
    NodeRole,
    NodeSpec,
    SecretSpec,
    VolumeSpec,
)

# Of longer templates the nodes tell what is wrong: reading one would keep the manager waiting.
TEMPLATE_CHECKED_BYTES_MAX = 64 * 1024
NODE_CERT_EXPIRY_NS_MIN = 3600 * SECOND_NS
HEARTBEAT_NS_MIN = SECOND_NS // 10
NETWORK_DRIVERS = ("overlay", "bridge")
_AVAILABILITIES = "active, pause or drain"


def check_secret(find: Finder, spec: SecretSpec) -> None:
    check_secret_name(find, spec.name)
    check_labels(find, spec.labels)
    if spec.driver is not None and spec.driver.name:
        find.add(
            "driver",
            f"secret drivers ({spec.driver.name!r}) are not offered; give the data itself",
        )
    if not 0 < len(spec.data) <= SECRET_BYTES_MAX:
        find.add(
            "data",
            f"a secret holds 1 to {SECRET_BYTES_MAX} bytes, this one {len(spec.data)}",
        )
    _check_templating(find, spec)


def check_config(find: Finder, spec: ConfigSpec) -> None:
    check_secret_name(find, spec.name)
    check_labels(find, spec.labels)
    if len(spec.data) > CONFIG_BYTES_MAX:
        find.add(
            "data",
            f"a config holds up to {CONFIG_BYTES_MAX} bytes, this one {len(spec.data)}; put larger "
            "files into the image or a volume",
        )
    _check_templating(find, spec)


def _check_templating(find: Finder, spec: SecretSpec | ConfigSpec) -> None:
    """A template that no task could expand is refused here, where its author sees it."""
    driver = spec.templating
    if driver is None:
        return
    if driver.options:
        find.add("template_driver", "a template driver has no options")
    if not find.one_of("template_driver", driver.name, DRIVERS) or not driver.name:
        return
    if len(spec.data) > TEMPLATE_CHECKED_BYTES_MAX:
        return
    if problem := payload_problem(spec.data, name=""):
        find.add("data", problem.message.removeprefix(": "))


def check_volume(find: Finder, spec: VolumeSpec) -> None:
    check_network_name(find, spec.name)
    check_labels(find, spec.labels)


# ---------------------------------------------------------------- networks


def check_network(find: Finder, spec: NetworkSpec) -> None:
    check_network_name(find, spec.name)
    check_labels(find, spec.labels)
    if spec.name in PREDEFINED_NETWORKS:
        find.add("name", f"{spec.name!r} is a network that every engine has; choose another name")
    driver = spec.driver.name if spec.driver else ""
    find.one_of("driver", driver, NETWORK_DRIVERS)
    find.one_of("scope", spec.scope, ("swarm", "local"))
    if spec.config_only or spec.config_from:
        find.add("config_only", "networks made from other networks' settings are not offered")
    if spec.ingress:
        find.add("ingress", "the routing mesh needs no network here: every node listens by itself")
    if spec.ipv4 is False and not spec.ipv6:
        find.add("ipv4", "a network without IPv4 needs ipv6: true and an IPv6 subnet")
    _check_ipam(find, spec)


def _check_ipam(find: Finder, spec: NetworkSpec) -> None:
    configs = spec.ipam.configs if spec.ipam else ()
    ipam_driver = spec.ipam.driver.name if spec.ipam and spec.ipam.driver else ""
    find.one_of("ipam.driver", ipam_driver, ("default",))
    subnets: list[tuple[int, ipaddress.IPv4Network | ipaddress.IPv6Network]] = []
    for i, config in enumerate(configs):
        subnet = _check_ipam_config(find.at(f"ipam.config[{i}]"), config)
        if subnet is None:
            continue
        for j, other in subnets:
            if overlap(subnet, other):
                find.add(
                    f"ipam.config[{i}].subnet", f"{subnet} overlaps with config[{j}] ({other})"
                )
        subnets.append((i, subnet))
    if spec.ipv6 and not any(s.version == 6 for _, s in subnets):
        find.add("ipv6", "an IPv6 network needs an IPv6 subnet; add one to ipam.config")


def _check_ipam_config(
    find: Finder, config: IpamConfig
) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    if not config.subnet:
        if config.gateway or config.range or config.aux_addresses:
            find.add("subnet", "a gateway, range or address is given without its subnet")
        return None
    try:
        subnet = ipaddress.ip_network(config.subnet)
    except ValueError as error:
        find.add("subnet", f"{config.subnet!r} is not a subnet such as 10.1.0.0/24 ({error})")
        return None
    for field, text in (("gateway", config.gateway), *sorted(config.aux_addresses.items())):
        if text and not _inside(text, subnet):
            find.add(field, f"{text!r} is not an address of {subnet}")
    if config.range and not _is_part(config.range, subnet):
        find.add("ip_range", f"{config.range!r} is not a part of {subnet}")
    return subnet


def _inside(text: str, subnet: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    try:
        return ipaddress.ip_address(text) in subnet
    except ValueError:
        return False


def _is_part(text: str, subnet: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    try:
        part = ipaddress.ip_network(text)
    except ValueError:
        return False
    return (
        part.version == subnet.version
        and part.network_address in subnet
        and part.broadcast_address in subnet
    )


# ---------------------------------------------------------------- node, cluster


def check_node(find: Finder, spec: NodeSpec) -> None:
    if spec.name:
        check_network_name(find, spec.name)
    check_labels(find, spec.labels)
    if spec.availability == Availability.UNSPECIFIED:
        find.add("availability", f"the availability is missing; give {_AVAILABILITIES}")
    if spec.role == NodeRole.UNSPECIFIED:
        find.add("role", "the role is missing; give worker or manager")


def check_cluster(find: Finder, spec: ClusterSpec, before: Cluster) -> None:
    """The new spec against the cluster as it is: some settings exist in Docker and are not offered
    here, so changing them is refused rather than ignored.
    """
    old = before.spec or ClusterSpec()
    check_labels(find, spec.labels)
    if spec.name != old.name:
        find.add("name", f"a cluster keeps its name ({old.name!r})")
    find.not_negative("task_history_limit", spec.task_history_limit, "a number of tasks")
    if spec.heartbeat_period_ns and spec.heartbeat_period_ns < HEARTBEAT_NS_MIN:
        find.add("heartbeat_period", "a heartbeat period is at least 100ms, or 0 to have it chosen")
    if 0 < spec.node_cert_expiry_ns < NODE_CERT_EXPIRY_NS_MIN or spec.node_cert_expiry_ns < 0:
        find.add("cert_expiry", "certificates live for at least 1h")
    lifetime_ns = spec.data_key_lifetime_ns
    if lifetime_ns and lifetime_ns < data_keys.LIFETIME_NS_MIN:
        find.add("data_key_lifetime", "data keys live for at least 1h, or 0 for 90 days")
    if spec.data_key_force_rotate < old.data_key_force_rotate:
        find.add(
            "data_key_rotate", f"it is counted up only, and is {old.data_key_force_rotate} already"
        )
    if spec.external_cas != old.external_cas:
        find.add("external_ca", "external CAs are not offered; leave it as it is")
    check_scheduling(find, spec)
    if spec.ca_force_rotate < old.ca_force_rotate:
        find.add("ca_rotate", f"it is counted up only, and is {old.ca_force_rotate} already")
    if spec.signing_ca_key and not spec.signing_ca_cert:
        find.add("ca_cert", "the certificate that belongs to the key is missing")
    changed = spec.signing_ca_cert and spec.signing_ca_cert != old.signing_ca_cert
    if changed and not spec.signing_ca_key:
        find.add("ca_key", "the private key that belongs to the certificate is missing")
