"""Reading what the engine says of a container: inspections, listings and event texts. Pure.

Everything here copes with the two dialects, Docker's (where fields moved over the years) and
Podman's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from agent.runtime.base import OOM, Phase, Started, failed_checks
from swarm.v1 import ContainerStatus, NetworkAttachment, PortConfig

KILLED = 137  # 128 + SIGKILL
_CREATED = ("created", "initialized", "configured")  # the last two are Podman's
_RUNNING = ("running", "paused", "restarting", "stopping")
_MIB = 1024 * 1024


def phase_of(status: str) -> Phase:
    """The phase for a status word of either dialect. A container whose start failed stays
    `created`.
    """
    if status in _RUNNING:
        return Phase.RUNNING
    return Phase.CREATED if status in _CREATED else Phase.EXITED


def started_of(container: Mapping[str, Any], cluster_id: Callable[[str], str]) -> Started:
    """What the worker learns of a container that runs; `cluster_id` turns the engine's network id
    into the cluster's, or into nothing.
    """
    state = container["State"]
    settings = container.get("NetworkSettings") or {}
    mode = str(container["HostConfig"].get("NetworkMode") or "")
    address = ""
    attachments: list[NetworkAttachment] = []
    for _, endpoint in _ordered(settings.get("Networks") or {}, mode):
        addresses = tuple(
            f"{value}/{endpoint.get(prefix) or 0}"
            for value, prefix in (
                (endpoint.get("IPAddress"), "IPPrefixLen"),
                (endpoint.get("GlobalIPv6Address"), "GlobalIPv6PrefixLen"),
            )
            if value
        )
        if addresses and not address:
            address = addresses[0].partition("/")[0]
        network_id = cluster_id(str(endpoint.get("NetworkID") or ""))
        if network_id:
            aliases = tuple(str(a) for a in endpoint.get("Aliases") or ())
            attachments.append(
                NetworkAttachment(network_id=network_id, addresses=addresses, aliases=aliases)
            )
    if mode == "host":
        address = "127.0.0.1"
    return Started(
        container=ContainerStatus(
            container_id=str(container["Id"]), pid=int(state.get("Pid") or 0)
        ),
        address=address,
        host_ports=_host_ports(settings.get("Ports") or {}),
        networks=tuple(attachments),
        healthy=health_of(container) is not False,
    )


def health_of(container: Mapping[str, Any]) -> bool | None:
    """What the healthcheck says: not passed yet counts as False; None: there is none."""
    health = container["State"].get("Health") or container["State"].get("Healthcheck")
    status = str((health or {}).get("Status") or "none")
    return None if status == "none" else status == "healthy"


def verdict_of(container: Mapping[str, Any]) -> bool | None:
    """The healthcheck's verdict; None: it has not come to one yet, or there is none."""
    health = container["State"].get("Health") or container["State"].get("Healthcheck") or {}
    return {"healthy": True, "unhealthy": False}.get(str(health.get("Status")))


class End(NamedTuple):
    """How a container ended; as in agent.runtime.base.Event."""

    code: int
    message: str = ""
    cause: str = ""
    forced: bool = False


def end_of(container: Mapping[str, Any], *, oom: bool = False) -> End:
    """Exit code and reason. `oom`: the engine told of it, whatever the state says."""
    state = container["State"]
    code = int(state.get("ExitCode") or 0)
    if code != 0 and (state.get("OOMKilled") or oom):
        limit_bytes = int(container["HostConfig"].get("Memory") or 0)
        if limit_bytes:
            text = f"out of memory: more than its limit of {limit_bytes / _MIB:g} MiB"
            return End(code, text, OOM)
        return End(code, "out of memory: the node has none left", OOM)
    return End(code, str(state.get("Error") or ""))


def last_output(container: Mapping[str, Any]) -> str:
    """How often the healthcheck has failed, and what it said last."""
    health = container["State"].get("Health") or container["State"].get("Healthcheck") or {}
    log = health.get("Log") or ()
    if not log:
        return ""
    output = str(log[-1].get("Output", "")).strip()
    return failed_checks(
        int(health.get("FailingStreak") or 0),
        output or f"the healthcheck ended with {log[-1].get('ExitCode')}",
    )


def health_of_status(status: str) -> bool | None:
    """Health from a listing's Status, "Up 3 seconds (healthy)"; None: undecided, or none."""
    if status.endswith("(healthy)"):
        return True
    if status.endswith("(unhealthy)"):
        return False
    return None


def _ordered(networks: Mapping[str, dict[str, Any]], mode: str) -> list[tuple[str, dict[str, Any]]]:
    """The networks with the one first that the container was made with."""
    return sorted(
        networks.items(),
        key=lambda item: (mode not in (item[0], item[1].get("NetworkID")), item[0]),
    )


def _host_ports(ports: Mapping[str, Any]) -> tuple[PortConfig, ...]:
    """The ports that the engine published; it lists each address family."""
    out = {
        (key, binding["HostPort"]): PortConfig(
            protocol=key.partition("/")[2] or "tcp",
            target_port=int(key.partition("/")[0]),
            published_port=int(binding["HostPort"]),
            publish_mode="host",
            host_ip=binding["HostIp"] if binding["HostIp"] not in ("0.0.0.0", "::") else "",
        )
        for key, bindings in sorted(ports.items())
        for binding in bindings or ()
        if str(binding.get("HostPort", "")).isdigit()
    }
    return tuple(out.values())
