"""`swarmctl info`: this node, and its cluster where a manager answers."""

from __future__ import annotations

from typing import Any

import click

from cli.connection import Connection, call
from cli.format import print_inspected
from cli.lazy import Command
from cli.options import format_option
from swarm.errors import NotManager
from swarm.v1 import GetInfoRequest, GetInfoResponse, GetNodeInfoRequest, GetNodeInfoResponse

Answer = tuple[GetNodeInfoResponse | None, GetInfoResponse | None, str]


@click.command(cls=Command)
@format_option
def command(form: str) -> None:
    """Show the node and its cluster."""

    async def work(connection: Connection) -> Answer:
        node = None
        if connection.target.socket:
            node = await connection.local.get_node_info(GetNodeInfoRequest())
            if not node.control_available:
                return node, None, str(connection.target)
        try:
            cluster = await connection.control.get_info(GetInfoRequest())
        except NotManager:
            return node, None, str(connection.target)  # it was one a moment ago
        return node, cluster, str(connection.target)

    answer = call(work)
    if form:
        print_inspected([document(answer)], form=form, known=frozenset(_ALL))
    else:
        for line in lines(answer):
            click.echo(line)
    for warning in answer[0].warnings if answer[0] else ():
        click.echo(f"Warning: {warning}", err=True)


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
    ("Revision", "revision"),
    ("Nodes", "nodes"),
    ("NodesReady", "nodes_ready"),
    ("Managers", "managers"),
    ("Services", "services"),
    ("Stacks", "stacks"),
    ("Tasks", "tasks"),
    ("TasksRunning", "tasks_running"),
    ("Leader", "leader_node_id"),
    ("ManagerAddrs", "manager_addrs"),
)
_ALL = {"Swarm", "Cluster", "Host", "Role", *(n for n, _ in _NODE), *(n for n, _ in _CLUSTER)}


def document(answer: Answer) -> dict[str, Any]:
    """The same as JSON; `Swarm` as in Docker's info."""
    node, cluster, target = answer

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
        swarm["Cluster"] = part(cluster, _CLUSTER)
        swarm["Nodes"], swarm["Managers"] = cluster.nodes, cluster.managers
    return {"Host": target, "Swarm": swarm}


def lines(answer: Answer) -> list[str]:
    """For people."""
    node, cluster, target = answer
    out = [f"Host: {target}"]
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
            f" Managers: {cluster.managers}",
            f" Nodes: {cluster.nodes} ({cluster.nodes_ready} ready)",
            f" Stacks: {cluster.stacks}",
            f" Services: {cluster.services}",
            f" Tasks: {cluster.tasks} ({cluster.tasks_running} running)",
            f" Leader: {cluster.leader_node_id}",
            f" Store: {cluster.store_engine}, revision {cluster.revision}",
        ]
    addresses = cluster.manager_addrs if cluster else node.managers if node else ()
    if addresses:
        out.append(" Manager Addresses:")
        out += [f"  {address}" for address in addresses]
    return out
