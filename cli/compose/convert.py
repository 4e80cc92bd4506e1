"""A service in its one form becomes a ServiceSpec, as docker's stack converter does it.

Names become STACK_name; labels com.docker.stack.namespace and com.docker.stack.image are added;
a service without networks joins the default one; each attachment gets the service's name as its
last alias; environment is sorted. Where Docker drops a key that the cluster can honour, it is kept.
"""

from __future__ import annotations

import re

from cli.compose import resources, rollout
from cli.compose.around import (
    IMAGE_LABEL,
    NAMESPACE_LABEL,
    PROCESS,
    Declared,
    Surroundings,
    deep,
    lookup,
    strings_of,
)
from cli.compose.at import At
from cli.compose.between import missing, waits_for
from cli.compose.container import container_spec, is_address, log_driver, namespace_of
from cli.compose.jobs import job_spec, priority
from cli.compose.keys import SERVICE, Support
from cli.compose.placement import placement
from cli.compose.ports import PORT_MAX, PROTOCOLS
from swarm.v1 import (
    Dependency,
    EndpointSpec,
    NetworkAttachmentSpec,
    PortConfig,
    ServiceSpec,
    TaskSpec,
)

# Networks of the engine itself: a task joins its host's, or none.
HOST_NETWORKS = ("host", "none")
CONDITIONS = ("service_started", "service_healthy", "service_completed_successfully")
IMAGE_CHARS_MAX = 1024
DEFAULT_DOMAIN = "docker.io"
_IMAGE_ID = re.compile(r"[0-9a-f]{64}")
# github.com/distribution/reference: [domain/]path[:tag][@digest].
_PATH = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::\d+)?"
_IMAGE = re.compile(
    rf"(?:{_DOMAIN}/)?{_PATH}(?:/{_PATH})*(?::\w[\w.-]{{0,127}})?"
    r"(?:@[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?",
    re.ASCII,
)


def convert_service(name: str, at: At, around: Surroundings) -> ServiceSpec:
    """The service's spec; what is wrong is in the report."""
    runtime = at.set_at("runtime")
    kind = runtime.text() if runtime is not None else ""
    at.refuse_keys(SERVICE)
    if kind == PROCESS:
        _refuse_docker_keys(at)
    image = _image(at, kind)
    labels = {**strings_of(at, "labels", "deploy"), NAMESPACE_LABEL: around.stack}
    if image[0]:
        labels[IMAGE_LABEL] = image[0]
    network_mode, networks = _networks(name, at, around)
    mode = resources.service_mode(at)
    endpoint_mode_at = deep(at, "deploy", "endpoint_mode")
    endpoint_mode = endpoint_mode_at.choice(("vip", "dnsrr"), fold=True) if endpoint_mode_at else ""
    is_job = mode.replicated_job is not None or mode.global_job is not None
    ports = _ports(at, no_ingress=_no_ingress(endpoint_mode, is_job=is_job))
    ports_at = at.set_at("ports")
    if network_mode and ports and ports_at is not None:
        if network_mode == "host":
            # As in docker compose: the program listens on the same ports of its host.
            ports_at.warn("not published: with network_mode: host the host's own ports are used")
            ports = ()
        else:
            ports_at.fail(
                "ports cannot be published without a network", "remove ports, or join a network"
            )
    return ServiceSpec(
        name=around.full(name),
        labels=dict(sorted(labels.items())),
        task=TaskSpec(
            container=container_spec(at, around, image[1], network_mode),
            resources=resources.requirements(at),
            restart=rollout.restart_policy(at),
            placement=placement(at, around),
            networks=networks,
            log_driver=log_driver(at),
            runtime=kind,
        ),
        mode=mode,
        update=rollout.update_config(at, "update_config", is_job=is_job),
        rollback=rollout.update_config(at, "rollback_config", is_job=is_job),
        endpoint=EndpointSpec(
            mode=endpoint_mode,
            ports=ports,
        ),
        depends_on=_depends_on(name, at, around),
        priority=priority(at),
        job=job_spec(at, mode),
    )


def _refuse_docker_keys(at: At) -> None:
    assert isinstance(at.node.value, dict)
    for key in at.node.value:
        known = SERVICE.get(key)
        if known is not None and known.support is Support.DOCKER_ONLY:
            at.fail_key(
                key,
                f'"{key}" is honoured by the docker runtime only, and this service has '
                "runtime: process",
                f"remove {key}, or remove runtime: process and name an image",
            )


def _image(at: At, kind: str) -> tuple[str, str]:
    """The image as written, and as Docker names it."""
    image = at.set_at("image")
    if kind == PROCESS:
        if image is not None:
            image.warn("not used by runtime: process, which runs programs of the host")
            return "", ""
        if not _has_items(at, "command") and not _has_items(at, "entrypoint"):
            at.fail("runtime: process needs a command", "add command: [program, argument]")
        return "", ""
    if image is None:
        if at.set_at("build") is None:  # which is refused with what to do
            at.lacks("image", "add image: NAME:TAG, or runtime: process for a host program")
        return "", ""
    text = image.text(empty=False)
    if text and (len(text) > IMAGE_CHARS_MAX or not _IMAGE.fullmatch(text)):
        name = text.rpartition("/")[2].partition(":")[0].partition("@")[0]
        if _IMAGE.fullmatch(text.replace(name, name.lower(), 1)):
            image.fail(f'"{text}": an image name is in lower case', f"write {name.lower()}")
        elif "://" in text:
            image.fail(f'"{text}" is a URL', f"write {text.partition('://')[2]}")
        else:
            image.fail(f'"{text}" is not an image name', "write NAME:TAG, such as nginx:1.27")
    return text, familiar(text) if text else ""


def familiar(image: str) -> str:
    """An image's name as Docker writes it: without the default domain, `:latest` where neither tag
    nor digest stands. An image's id stays.
    """
    if _IMAGE_ID.fullmatch(image):
        return image
    domain, slash, path = image.partition("/")
    if not slash or not (set(".:") & set(domain) or domain == "localhost" or not domain.islower()):
        domain, path = DEFAULT_DOMAIN, image
    if domain in (DEFAULT_DOMAIN, f"index.{DEFAULT_DOMAIN}"):
        inner = path.removeprefix("library/")
        named = path if "/" in inner else inner
    else:
        named = image
    return named if "@" in named or ":" in named.rpartition("/")[2] else f"{named}:latest"


def _has_items(at: At, key: str) -> bool:
    found = at.set_at(key)
    return found is not None and bool(found.node.value)


def _networks(
    name: str, at: At, around: Surroundings
) -> tuple[str, tuple[NetworkAttachmentSpec, ...]]:
    """The network mode, and the networks joined, in order of their full names."""
    mode_at, joined_at = at.set_at("network_mode"), at.set_at("networks")
    mode = ""
    if mode_at is not None:
        text = mode_at.node.value
        if isinstance(text, str) and text.startswith(("service:", "container:")):
            mode = namespace_of(at, "network_mode", "host", "none")
        elif text in ("bridge", "default"):
            mode_at.warn(
                f'the engine\'s own network "{text}" does not reach across hosts; the service '
                "joins the stack's networks"
            )
        else:
            mode = mode_at.choice(("host", "none"))
        if joined_at is not None and joined_at.node.value and mode:
            at.fail_key(
                "networks",
                f"networks cannot be joined with network_mode: {mode}",
                "remove one of them",
            )
        if text not in ("bridge", "default"):
            return mode, ()
    attachments: dict[str, NetworkAttachmentSpec] = {}
    if joined_at is not None and joined_at.node.value:
        for key, value in joined_at.items():
            declared = around.networks.get(key)
            if declared is None:
                lookup("network", key, value, around.networks)
                continue
            if declared.external and declared.full_name in HOST_NETWORKS:
                mode = declared.full_name
                continue
            attachments[key] = _attachment(name, value, declared, around.aliases.of(name, key))
    else:
        default = around.networks["default"]
        if default.external and default.full_name in HOST_NETWORKS:
            return default.full_name, ()
        aliases = (*around.aliases.of(name, "default"), name)
        return "", (NetworkAttachmentSpec(target=default.full_name, aliases=aliases),)
    if mode and attachments:
        at.fail_key(
            "networks",
            f'a task on the network "{mode}" cannot join others ({", ".join(sorted(attachments))})',
            "remove one of them",
        )
    return mode, tuple(sorted(attachments.values(), key=lambda each: each.target))


def _attachment(
    name: str, at: At, declared: Declared, others: tuple[str, ...]
) -> NetworkAttachmentSpec:
    def text(key: str) -> str:
        found = at.set_at(key)
        return found.text() if found is not None else ""

    for key, version in (("ipv4_address", 4), ("ipv6_address", 6)):
        address = at.set_at(key)
        if address is not None and not is_address(address.text(), version):
            address.fail(
                f"{address.shown()} is not an IPv{version} address", "remove it, or write one"
            )
    aliases, priority = at.set_at("aliases"), at.set_at("priority")
    given = dict.fromkeys(aliases.texts() if aliases is not None else ())  # two files may repeat
    return NetworkAttachmentSpec(
        target=declared.full_name,
        aliases=(*given, *(each for each in others if each not in given), name),
        driver_opts=strings_of(at, "driver_opts"),
        ipv4_address=text("ipv4_address"),
        ipv6_address=text("ipv6_address"),
        priority=priority.integer(least=-(2**31), most=2**31 - 1) if priority is not None else 0,
    )


def _no_ingress(endpoint_mode: str, *, is_job: bool) -> str:
    """Why no port can be published in mode ingress; empty when it can."""
    if is_job:
        return "a job publishes no ports in mode ingress"
    return "endpoint_mode dnsrr has no ports in mode ingress" if endpoint_mode == "dnsrr" else ""


def _ports(at: At, *, no_ingress: str) -> tuple[PortConfig, ...]:
    found = at.set_at("ports")
    ports: dict[PortConfig, None] = {}
    taken: dict[tuple[int, str], dict[str, PortConfig]] = {}  # by port, then by address
    for each in found.elements() if found is not None else ():
        port = _port(each)
        if port.publish_mode == "ingress" and no_ingress:
            each.fail(no_ingress, "write the long form with mode: host")
        elif port.publish_mode == "ingress" and port.protocol == "sctp":
            each.fail("sctp is not balanced over nodes", "write the long form with mode: host")
        if port in ports:
            continue
        ports[port] = None
        if not port.published_port:
            continue
        # An address of its own is beside another address, and not beside all of them.
        others = taken.setdefault((port.published_port, port.protocol), {})
        other = others.get(port.host_ip) or others.get("")
        if other is None and not port.host_ip:
            other = next(iter(others.values()), None)
        if other is not None:
            each.fail(
                f"the port {port.published_port}/{port.protocol} is published twice, for "
                f"{other.target_port} and {port.target_port}",
                "publish one of them elsewhere",
            )
        others[port.host_ip] = port
    return tuple(sorted(ports, key=lambda port: port.published_port))


def _port(at: At) -> PortConfig:
    target, published = at.set_at("target"), at.set_at("published")
    protocol, mode = at.set_at("protocol"), at.set_at("mode")
    host_ip, name = at.set_at("host_ip"), at.set_at("name")
    if (app := at.set_at("app_protocol")) is not None:
        app.text()
    publish_mode = mode.choice(("ingress", "host", "")) if mode is not None else "ingress"
    address = host_ip.text() if host_ip is not None else ""
    if address and publish_mode == "ingress" and host_ip is not None:
        host_ip.warn(
            f"the address {address} is not used: in mode ingress every node listens on all "
            "addresses; write the long form with mode: host to listen on one"
        )
        address = ""
    if published is not None and "-" in str(published.node.value).lstrip("-"):
        published.fail(
            f'a range cannot be chosen from ("{published.node.value}")',
            "write one port, or leave published out and the cluster chooses",
        )
        published = None
    if published is not None and published.node.value == "":
        published = None
    return PortConfig(
        name=name.text() if name is not None else "",
        protocol=(protocol.choice((*PROTOCOLS, ""), fold=True) if protocol else "") or "tcp",
        target_port=target.integer(least=1, most=PORT_MAX) if target is not None else 0,
        published_port=published.integer(least=0, most=PORT_MAX) if published is not None else 0,
        publish_mode=publish_mode or "ingress",
        host_ip=address,
    )


def _depends_on(name: str, at: At, around: Surroundings) -> tuple[Dependency, ...]:
    """Whom the tasks wait for, by name; links wait as well, until the other has started."""
    found = at.set_at("depends_on")
    gates: dict[str, Dependency] = {}
    for other, each in found.items() if found is not None else ():
        condition, needed = each.set_at("condition"), each.set_at("required")
        restart = each.set_at("restart")
        required = needed.truth() if needed is not None else True
        if other == name:
            each.fail("a service cannot wait for itself", "remove it")
        elif other not in around.services and required:
            missing(other, each, around.services, around.left_out)
        if other not in around.services:
            continue
        gates[other] = Dependency(
            service=around.full(other),
            condition=condition.choice(CONDITIONS) if condition is not None else CONDITIONS[0],
            required=required,
            restart=restart.truth() if restart is not None else False,
        )
    for other in waits_for(at):
        if other in around.services and other not in gates and other != name:
            gates[other] = Dependency(
                service=around.full(other), condition=CONDITIONS[0], required=True
            )
    return tuple(gate for _, gate in sorted(gates.items()))
