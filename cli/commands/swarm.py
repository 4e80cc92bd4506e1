"""`swarmctl swarm`: the cluster as a whole, and this node's part in it."""

from __future__ import annotations

from typing import Any

import click

from cli.cluster import HOUR_NS, change_cluster, get_cluster, update_cluster
from cli.commands import swarm_audit, swarm_backup, swarm_ca, swarm_lock
from cli.connection import Connection, call
from cli.etcd import etcd_access, etcd_options
from cli.lazy import Group
from cli.objects import inspect_all
from cli.options import DURATION, format_option
from cli.placement_flags import GPU_POLICY, STRATEGY
from swarm.errors import Invalid
from swarm.v1 import (
    Availability,
    ClusterSpec,
    GetJoinTokensRequest,
    GetJoinTokensResponse,
    InitRequest,
    InitResponse,
    JoinRequest,
    JoinResponse,
    Kind,
    LeaveRequest,
    LeaveResponse,
    NodeRole,
)

CERT_EXPIRY_NS = 90 * 24 * HOUR_NS  # Docker's default
TASK_HISTORY = 5  # Docker's default
# Until init, join and leave must be done: the second manager's coming moves the cluster's state.
JOIN_S = 180.0
_AVAILABILITY = click.Choice(["active", "pause", "drain"])


@click.group(cls=Group)
def group() -> None:
    """Make, join, leave, configure, back up and restore a cluster."""


group.add_command(swarm_audit.command, "audit")
group.add_command(swarm_backup.backup)
group.add_command(swarm_backup.restore)
group.add_command(swarm_ca.command, "ca")
group.add_command(swarm_lock.unlock)
group.add_command(swarm_lock.unlock_key)


def _node_options(function: Any) -> Any:
    for decorate in (
        click.option(
            "--availability", type=_AVAILABILITY, default="active", help="Whether it takes tasks."
        ),
        click.option(
            "--data-path-addr", default="", metavar="ADDR", help="Address for tasks' traffic."
        ),
        click.option(
            "--listen-addr",
            default="",
            metavar="ADDR",
            help="Address a manager listens on (0.0.0.0:2377).",
        ),
        click.option(
            "--advertise-addr",
            default="",
            metavar="ADDR",
            help="Address others reach this node at: host[:port] or an interface.",
        ),
    ):
        function = decorate(function)
    return function


def _cluster_options(function: Any) -> Any:
    for decorate in (
        click.option(
            "--task-history-limit",
            type=click.IntRange(min=0),
            help="Ended tasks kept per slot (5).",
        ),
        click.option(
            "--snapshot-interval", type=click.IntRange(min=0), help="Log entries between."
        ),
        click.option("--max-snapshots", type=click.IntRange(min=0), help="Old snapshots kept."),
        click.option("--external-ca", multiple=True, metavar="CA", help="protocol=cfssl,url=URL."),
        click.option("--dispatcher-heartbeat", type=DURATION, help="Heartbeat; 0: automatic."),
        click.option("--cert-expiry", type=DURATION, help="Lifetime of node certificates (2160h)."),
        click.option(
            "--data-key-lifetime",
            type=DURATION,
            help="How long a key seals secrets before the next one does (2160h).",
        ),
        click.option(
            "--placement-strategy",
            type=STRATEGY,
            help="For services that say nothing: spread tasks over nodes or binpack (spread).",
        ),
        click.option(
            "--gpu-policy", type=GPU_POLICY, help="How nodes for tasks with GPUs are chosen (fgd)."
        ),
        click.option(
            "--rebalance/--no-rebalance",
            default=None,
            help="Move tasks by itself when nodes are loaded unevenly (no).",
        ),
        click.option(
            "--rebalance-after",
            type=DURATION,
            help="The same, so long after nodes and services last changed (5m).",
        ),
    ):
        function = decorate(function)
    return function


@group.command()
@_node_options
@_cluster_options
@click.option("--autolock", is_flag=True, default=None, help="Keys at rest need the unlock key.")
@click.option(
    "--data-path-port", type=click.IntRange(1024, 49151), default=None, help="UDP port (4789)."
)
@click.option(
    "--default-addr-pool", multiple=True, metavar="CIDR", help="Where networks get subnets from."
)
@click.option(
    "--default-addr-pool-mask-length",
    type=click.IntRange(1, 32),
    default=24,
    show_default=True,
    help="Prefix length of those subnets.",
)
@click.option("--force-new-cluster", is_flag=True, help="Go on alone with this manager's state.")
@click.option(
    "--store",
    type=click.Choice(["auto", "embedded", "etcd"]),
    default="auto",
    show_default=True,
    help="What holds the cluster's state: embedded (this manager alone, more can come where etcd "
    "is installed), etcd, or auto: etcd where it is installed.",
)
@etcd_options
def init(**given: Any) -> None:
    """Make a new cluster with this node as its first manager.

    With --force-new-cluster, on a manager whose cluster has lost most of its managers for good: go
    on alone with the state that this one has.
    """
    etcd = etcd_access(given)
    initial = ClusterSpec(
        name="default", task_history_limit=TASK_HISTORY, node_cert_expiry_ns=CERT_EXPIRY_NS
    )
    request = InitRequest(
        listen_addr=given["listen_addr"],
        advertise_addr=given["advertise_addr"],
        data_path_addr=given["data_path_addr"],
        data_path_port=given["data_path_port"] or 0,
        availability=Availability[given["availability"].upper()],
        spec=change_cluster(initial, given),
        default_addr_pool=tuple(
            part for text in given["default_addr_pool"] for part in text.split(",")
        ),
        subnet_size=given["default_addr_pool_mask_length"],
        force_new_cluster=given["force_new_cluster"],
        store="etcd" if etcd is not None else given["store"],
        etcd=etcd,
    )

    async def work(connection: Connection) -> InitResponse:
        return await connection.local.init(request, timeout_s=JOIN_S)

    answer = call(work)
    if given["force_new_cluster"]:
        click.echo(
            f"This node ({answer.node_id}) goes on with its cluster, as its only manager. The\n"
            "others are no part of it any more: run 'swarmctl swarm leave --force' on each of\n"
            "them before it joins again. Workers come back by themselves.\n"
        )
    click.echo(
        f"Swarm initialized: current node ({answer.node_id}) is now a manager.\n\n"
        "To add a worker to this swarm, run the following command:\n\n"
        f"    swarmctl swarm join --token {answer.worker_token} {answer.addr}\n\n"
        "To add a manager to this swarm, run 'swarmctl swarm join-token manager' and follow the "
        "instructions.\n"
    )
    if given["autolock"]:
        call(swarm_lock.give_out)


@group.command()
@_node_options
@click.option("--token", required=True, help="Join token; it picks the role.")
@click.option(
    "--data-path-port", type=click.IntRange(1024, 49151), default=None, hidden=True, help="Port."
)
@click.argument("managers", nargs=-1, required=True, metavar="HOST[:PORT]...")
def join(managers: tuple[str, ...], token: str, **given: Any) -> None:
    """Join a cluster through one of its managers."""
    request = JoinRequest(
        listen_addr=given["listen_addr"],
        advertise_addr=given["advertise_addr"],
        data_path_addr=given["data_path_addr"],
        data_path_port=given["data_path_port"] or 0,
        availability=Availability[given["availability"].upper()],
        remote_addrs=managers,
        token=token,
    )

    async def work(connection: Connection) -> JoinResponse:
        return await connection.local.join(request, timeout_s=JOIN_S)

    answer = call(work)
    role = "manager" if answer.role == NodeRole.MANAGER else "worker"
    click.echo(f"This node joined a swarm as a {role}.")


@group.command()
@click.option("-f", "--force", is_flag=True, help="Although the cluster's state is lost with it.")
def leave(*, force: bool) -> None:
    """Take this node out of its cluster."""

    async def work(connection: Connection) -> LeaveResponse:
        return await connection.local.leave(LeaveRequest(force=force), timeout_s=JOIN_S)

    answer = call(work)
    click.echo("Node left the swarm.")
    for warning in answer.warnings:
        click.echo(f"Warning: {warning}", err=True)


@group.command("join-token")
@click.argument("role", type=click.Choice(["worker", "manager"]))
@click.option("--rotate", is_flag=True, help="Make a new token; the old one is void.")
@click.option("-q", "--quiet", is_flag=True, help="Print the token only.")
def join_token(role: str, *, rotate: bool, quiet: bool) -> None:
    """Show how other nodes join."""
    request = GetJoinTokensRequest(
        rotate_worker=rotate and role == "worker", rotate_manager=rotate and role == "manager"
    )

    async def work(connection: Connection) -> GetJoinTokensResponse:
        return await connection.control.get_join_tokens(request)

    answer = call(work)
    token = answer.worker if role == "worker" else answer.manager
    if quiet:
        click.echo(token)
        return
    if rotate:
        click.echo(f"Successfully rotated {role} join token.\n")
    click.echo(
        f"To add a {role} to this swarm, run the following command:\n\n"
        f"    swarmctl swarm join --token {token} {answer.addr}\n"
    )


@group.command()
@format_option
def inspect(*, form: str) -> None:
    """Show the cluster's settings as JSON."""
    inspect_all(Kind.CLUSTER, [""], form=form)


@group.command()
@_cluster_options
@click.option("--autolock/--no-autolock", default=None, help="Keys at rest need the unlock key.")
@click.option(
    "--rotate-data-key",
    is_flag=True,
    default=None,
    help="Seal secrets with a new key now, and those that are there anew.",
)
def update(**given: Any) -> None:
    """Change the cluster's settings."""
    if not any(value is not None and value != () for value in given.values()):
        raise Invalid("nothing to change: give at least one option (see --help)")

    async def work(connection: Connection) -> None:
        before = await get_cluster(connection)
        assert before.spec is not None
        spec = change_cluster(before.spec, given)
        await update_cluster(connection, before, spec)
        click.echo("Swarm updated.")
        if spec.autolock_managers and not before.spec.autolock_managers:
            await swarm_lock.give_out(connection)

    call(work)
