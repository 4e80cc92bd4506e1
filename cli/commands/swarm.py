"""`swarmctl swarm`: the cluster as a whole, and this node's part in it."""

from __future__ import annotations

import asyncio
import csv
from typing import Any

import click
import msgspec

from cli.commands import swarm_audit, swarm_backup
from cli.connection import Connection, call
from cli.lazy import Command, Group
from cli.options import DURATION, detach_options, read_input
from swarm.clock import SECOND_NS
from swarm.errors import EXIT_NOT_CONVERGED, Invalid
from swarm.v1 import (
    Availability,
    Cluster,
    ClusterSpec,
    ExternalCa,
    GetJoinTokensRequest,
    GetJoinTokensResponse,
    GetRequest,
    InitRequest,
    InitResponse,
    JoinRequest,
    JoinResponse,
    Kind,
    LeaveRequest,
    NodeRole,
    RaftConfig,
    Spec,
    UpdateRequest,
    WatchRequest,
)

HOUR_NS = 3600 * SECOND_NS
CERT_EXPIRY_NS = 90 * 24 * HOUR_NS  # Docker's default
TASK_HISTORY = 5  # Docker's default
JOIN_S = 60.0  # seconds until init and join must be done
_AVAILABILITY = click.Choice(["active", "pause", "drain"])
_PEM_BEGIN = "-----BEGIN"


@click.group(cls=Group)
def group() -> None:
    """Make, join, leave, configure, back up and restore a cluster."""


group.add_command(swarm_audit.command, "audit")
group.add_command(swarm_backup.backup)
group.add_command(swarm_backup.restore)


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
            default="0.0.0.0:2377",
            show_default=True,
            metavar="ADDR",
            help="Address a manager listens on.",
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
    ):
        function = decorate(function)
    return function


def change_cluster(spec: ClusterSpec, given: dict[str, Any]) -> ClusterSpec:
    """The spec with the options that were given. Raises Invalid."""
    changes: dict[str, Any] = {}
    for option, field in (
        ("cert_expiry", "node_cert_expiry_ns"),
        ("dispatcher_heartbeat", "heartbeat_period_ns"),
        ("task_history_limit", "task_history_limit"),
        ("autolock", "autolock_managers"),
    ):
        if given.get(option) is not None:
            changes[field] = given[option]
    expiry = given.get("cert_expiry")
    if expiry is not None and expiry < HOUR_NS:
        raise Invalid("--cert-expiry: the shortest lifetime of node certificates is 1h")
    if given.get("external_ca"):
        changes["external_cas"] = tuple(external_ca(text) for text in given["external_ca"])
    raft = spec.raft or RaftConfig(
        snapshot_interval=10000,
        log_entries_for_slow_followers=500,
        election_tick=10,
        heartbeat_tick=1,
    )
    if given.get("snapshot_interval") is not None:
        raft = msgspec.structs.replace(raft, snapshot_interval=given["snapshot_interval"])
    if given.get("max_snapshots") is not None:
        raft = msgspec.structs.replace(raft, keep_old_snapshots=given["max_snapshots"])
    if raft != spec.raft:
        changes["raft"] = raft
    return msgspec.structs.replace(spec, **changes)


def external_ca(text: str) -> ExternalCa:
    """`protocol=cfssl,url=https://ca.example.com,cacert=FILE`. Raises Invalid."""
    found: dict[str, str] = {}
    for word in next(csv.reader([text]), []):
        key, separator, value = word.strip().partition("=")
        if not separator:
            raise Invalid(f"--external-ca {text!r}: {word!r} is not key=value")
        found[key.lower()] = value
    protocol, url = found.pop("protocol", ""), found.pop("url", "")
    if protocol != "cfssl" or not url:
        raise Invalid(f"--external-ca {text!r}: write protocol=cfssl,url=URL")
    path = found.pop("cacert", "")
    pem = read_input(path, what="external CA's certificate").decode() if path else ""
    return ExternalCa(protocol=protocol, url=url, options=found, ca_cert=pem)


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
@click.option("--force-new-cluster", is_flag=True, help="Go on alone with this node's state.")
@click.option(
    "--store",
    type=click.Choice(["auto", "embedded", "etcd"]),
    default="auto",
    show_default=True,
    help="Engine that holds the cluster's state.",
)
def init(**given: Any) -> None:
    """Make a new cluster with this node as its first manager."""
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
        store=given["store"],
    )

    async def work(connection: Connection) -> InitResponse:
        return await connection.local.init(request, timeout_s=JOIN_S)

    answer = call(work)
    click.echo(
        f"Swarm initialized: current node ({answer.node_id}) is now a manager.\n\n"
        "To add a worker to this swarm, run the following command:\n\n"
        f"    swarmctl swarm join --token {answer.worker_token} {answer.addr}\n\n"
        "To add a manager to this swarm, run 'swarmctl swarm join-token manager' and follow the "
        "instructions.\n"
    )


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

    async def work(connection: Connection) -> None:
        await connection.local.leave(LeaveRequest(force=force), timeout_s=JOIN_S)

    call(work)
    click.echo("Node left the swarm.")


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


async def _cluster(connection: Connection) -> Cluster:
    answer = await connection.control.get(GetRequest(kind=Kind.CLUSTER))
    found = answer.object.cluster if answer.object else None
    assert found is not None and found.spec is not None and found.meta is not None
    return found


async def _update(connection: Connection, before: Cluster, spec: ClusterSpec) -> int:
    assert before.meta is not None
    answer = await connection.control.update(
        UpdateRequest(
            kind=Kind.CLUSTER, id=before.id, version=before.meta.version, spec=Spec(cluster=spec)
        )
    )
    for warning in answer.warnings:
        click.echo(f"Warning: {warning}", err=True)
    return answer.version


@group.command()
@_cluster_options
@click.option("--autolock/--no-autolock", default=None, help="Keys at rest need the unlock key.")
def update(**given: Any) -> None:
    """Change the cluster's settings."""
    if not any(value is not None and value != () for value in given.values()):
        raise Invalid("nothing to change: give at least one option (see --help)")

    async def work(connection: Connection) -> None:
        before = await _cluster(connection)
        assert before.spec is not None
        await _update(connection, before, change_cluster(before.spec, given))

    call(work)
    click.echo("Swarm updated.")


@group.command(cls=Command)
@click.option("--rotate", is_flag=True, help="Make a new root and move all nodes to it.")
@click.option("--ca-cert", default="", metavar="FILE", help="With --rotate: the new root, PEM.")
@click.option("--ca-key", default="", metavar="FILE", help="With --rotate: its key, PEM.")
@click.option("--cert-expiry", type=DURATION, help="With --rotate: lifetime of certificates.")
@click.option("--external-ca", multiple=True, metavar="CA", help="With --rotate: external CA.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@detach_options(until="all nodes trust the new root")
def ca(*, rotate: bool, quiet: bool, detach: bool, timeout_ns: int, **given: Any) -> int:
    """Print the cluster's root certificate, or rotate it."""
    if not rotate and any(value for value in given.values()):
        raise click.UsageError(
            "--ca-cert, --ca-key, --cert-expiry and --external-ca need --rotate."
        )
    if bool(given["ca_cert"]) != bool(given["ca_key"]):
        raise click.UsageError("--ca-cert and --ca-key go together.")
    pems = {
        name: read_input(given[name], what=name.replace("_", " ")).decode(errors="replace")
        for name in ("ca_cert", "ca_key")
        if given[name]
    }
    for name, pem in pems.items():
        if _PEM_BEGIN not in pem:
            raise Invalid(f"--{name.replace('_', '-')}: {given[name]} holds no PEM")

    async def work(connection: Connection) -> tuple[str, int]:
        before = await _cluster(connection)
        if not rotate:
            return before.root_ca_pem, 0
        assert before.spec is not None
        spec = msgspec.structs.replace(
            change_cluster(before.spec, given),
            ca_force_rotate=before.spec.ca_force_rotate + 1,
            signing_ca_cert=pems.get("ca_cert", ""),
            signing_ca_key=pems.get("ca_key", ""),
        )
        version = await _update(connection, before, spec)
        if detach:
            return "", 0
        if not quiet:
            click.echo("Rotating the root certificate; nodes get new certificates …", err=True)
        try:
            async with asyncio.timeout(timeout_ns / SECOND_NS if timeout_ns else None):
                return await _rotated(connection, before, version), 0
        except TimeoutError:
            click.echo("Error: the rotation is not over yet; it goes on by itself", err=True)
            return "", EXIT_NOT_CONVERGED

    pem, code = call(work)
    click.echo(pem, nl=not pem.endswith("\n")) if pem else None
    return code


async def _rotated(connection: Connection, before: Cluster, version: int) -> str:
    """The new root once every node has moved to it."""
    request = WatchRequest(kinds=(Kind.CLUSTER,), from_revision=version)
    found = await _cluster(connection)
    if found.root_ca_pem != before.root_ca_pem and not found.root_rotation_in_progress:
        return found.root_ca_pem
    async for answer in connection.control.watch(request):
        for event in answer.events:
            cluster = event.object.cluster if event.object else None
            if cluster is None or cluster.root_rotation_in_progress:
                continue
            if cluster.root_ca_pem != before.root_ca_pem:
                return cluster.root_ca_pem
    return (await _cluster(connection)).root_ca_pem
