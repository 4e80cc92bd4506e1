"""`swarmctl info`: this node, and its cluster where a manager answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from cli.connection import Connection, call
from cli.format import print_inspected
from cli.lazy import Command
from cli.objects import list_objects, name_of
from cli.options import format_option
from cli.pretty import manager_word
from swarm.errors import NotManager, Unavailable
from swarm.quantities import format_bytes
from swarm.v1 import (
    GetInfoRequest,
    GetInfoResponse,
    GetNodeInfoRequest,
    GetNodeInfoResponse,
    Kind,
    Node,
    Reachability,
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known, and from whom."""

    target: str
    node: GetNodeInfoResponse | None = None
    cluster: GetInfoResponse | None = None
    # Those that are to be managers or are.
    managers: tuple[Node, ...] = ()
    # Why `cluster` is only what the manager knew last; empty: it is up to date.
    problem: str = ""


@click.command(cls=Command)
@format_option
def command(form: str) -> None:
    """Show the node and its cluster.

    A manager that has lost touch with the others shows what it knew last, and says so.
    """
    answer = call(_ask)
    if form:
        print_inspected([document(answer)], form=form, known=frozenset(_ALL))
    else:
        for line in lines(answer):
            click.echo(line)
    for warning in warnings(answer):
        click.echo(f"Warning: {warning}", err=True)


async def _ask(connection: Connection) -> Answer:
    node = None
    target = str(connection.target)
    if connection.target.socket:
        node = await connection.local.get_node_info(GetNodeInfoRequest())
        if not node.control_available:
            return Answer(target, node)
    try:
        cluster, managers = await _cluster(connection)
    except NotManager:
        return Answer(target, node)  # it was one a moment ago
    except Unavailable as error:
        try:
            async with Connection(connection.target, stale=True) as stale:
                cluster, managers = await _cluster(stale)
        except Unavailable:
            raise error from None
        return Answer(target, node, cluster, managers, problem=error.message)
    return Answer(target, node, cluster, managers)


async def _cluster(connection: Connection) -> tuple[GetInfoResponse, tuple[Node, ...]]:
    info = await connection.control.get_info(GetInfoRequest())
    if info.managers < 2:
        return info, ()
    nodes = await list_objects(connection, Kind.NODE)
    return info, tuple(n for n in nodes if manager_word(n))


_NODE = (
    ("NodeID", "node_id"),
    ("LocalNodeState", "state"),
    ("Error", "error"),
    ("ControlAvailable", "control_available"),
    ("NodeAddr", "node_addr"),
    ("RemoteManagers", "managers"),
    ("Hostname", "hostname"),
    ("Version", "version"),
    ("Runtimes", "runtimes"),
    ("Connected", "connected"),
    ("Tasks", "tasks"),
    ("Warnings", "warnings"),
)
_CLUSTER = (
    ("ID", "cluster_id"),
    ("StoreEngine", "store_engine"),
    ("StoreVersion", "store_version"),
    ("StoreBytes", "store_bytes"),
    ("StoreBytesUsed", "store_bytes_used"),
    ("Revision", "revision"),
    ("Nodes", "nodes"),
    ("NodesReady", "nodes_ready"),
    ("Managers", "managers"),
    ("ManagersReachable", "managers_reachable"),
    ("Services", "services"),
    ("Stacks", "stacks"),
    ("Tasks", "tasks"),
    ("TasksRunning", "tasks_running"),
    ("Leader", "leader_node_id"),
    ("ManagerAddrs", "manager_addrs"),
)
_ALL = {"Swarm", "Cluster", "Host", "Role", "ManagerStatus", "Problem"}
_ALL |= {*(n for n, _ in _NODE), *(n for n, _ in _CLUSTER)}


def document(answer: Answer) -> dict[str, Any]:
    """The same as JSON; `Swarm` as in Docker's info."""
    node, cluster = answer.node, answer.cluster

    def part(message: Any, table: tuple[tuple[str, str], ...]) -> dict[str, Any]:
        found = {}
        for name, ours in table:
            value = getattr(message, ours)
            found[name] = list(value) if isinstance(value, tuple) else value
        return found

    swarm = part(node, _NODE) if node else {"LocalNodeState": "active", "ControlAvailable": True}
    if node is not None:
        swarm["Role"] = node.role.name.lower() if node.role else ""
    if cluster is not None:
        swarm["Cluster"] = part(cluster, _CLUSTER) | {"Problem": answer.problem}
        swarm["ManagerStatus"] = own_status(answer)
        swarm["Nodes"], swarm["Managers"] = cluster.nodes, cluster.managers
    return {"Host": answer.target, "Swarm": swarm}


def own_status(answer: Answer) -> str:
    """What the manager that answers is among the others."""
    cluster = answer.cluster
    assert cluster is not None
    own = next((manager_word(n) for n in answer.managers if n.id == cluster.node_id), "")
    if answer.problem:
        return "Unreachable"
    return own or ("Leader" if cluster.node_id == cluster.leader_node_id else "Reachable")


def warnings(answer: Answer) -> list[str]:
    """What somebody should look at."""
    out = list(answer.node.warnings) if answer.node else []
    cluster = answer.cluster
    if cluster is None:
        return out
    if answer.problem:
        out.append(
            f"this is what the manager knew at revision {cluster.revision}, and it may be old: "
            f"{answer.problem}"
        )
    members = [n for n in answer.managers if n.manager_status is not None]
    for node in members:
        status = node.manager_status
        if status is not None and status.reachability is Reachability.UNREACHABLE:
            out.append(f"manager {name_of(node)} ({status.addr}) is unreachable")
    count = len(members)
    if count == 2:
        out.append(
            "with two managers the loss of either stops all changes: a majority of two is both. "
            "Add a third manager"
        )
    elif count and count % 2 == 0:
        out.append(
            f"{count} managers survive the loss of {(count - 1) // 2}, as {count - 1} would: an "
            "even number gains nothing. Add or demote one"
        )
    return out


def lines(answer: Answer) -> list[str]:
    """For people."""
    node, cluster = answer.node, answer.cluster
    out = [f"Host: {answer.target}"]
    if node is not None:
        out += [f"Hostname: {node.hostname}", f"Server Version: {node.version}"]
        out += [f"Runtimes: {', '.join(node.runtimes) or 'none'}", f"Swarm: {node.state}"]
        if node.error:
            out.append(f" Error: {node.error}")
        if node.node_id:
            out.append(f" NodeID: {node.node_id}")
            out.append(f" Role: {node.role.name.lower()}")
            out.append(f" Is Manager: {str(node.control_available).lower()}")
            out.append(f" Node Address: {node.node_addr}")
            out.append(f" Connected: {str(node.connected).lower()}")
            out.append(f" Tasks here: {node.tasks}")
    if cluster is not None:
        out += [
            f" ClusterID: {cluster.cluster_id}",
            f" Manager Status: {own_status(answer)}",
            f" Managers: {cluster.managers}{_reachable(cluster)}",
            f" Nodes: {cluster.nodes} ({cluster.nodes_ready} ready)",
            f" Stacks: {cluster.stacks}",
            f" Services: {cluster.services}",
            f" Tasks: {cluster.tasks} ({cluster.tasks_running} running)",
            f" Leader: {cluster.leader_node_id}",
            f" Store: {_store(cluster)}",
        ]
    addresses = cluster.manager_addrs if cluster else node.managers if node else ()
    if addresses:
        out.append(" Manager Addresses:")
        out += [f"  {address}" for address in addresses]
    return out


def _reachable(cluster: GetInfoResponse) -> str:
    return f" ({cluster.managers_reachable} reachable)" if cluster.managers > 1 else ""


def _store(cluster: GetInfoResponse) -> str:
    """ "etcd 3.4.23, revision 4711, 24.5 MiB (3.1 MiB used)"."""
    name = cluster.store_version or cluster.store_engine
    text = f"{name}, revision {cluster.revision}"
    if cluster.store_bytes:
        used = format_bytes(cluster.store_bytes_used)
        text += f", {format_bytes(cluster.store_bytes)} ({used} used)"
    return text
