"""`swarmctl swarm ca`: the cluster's root certificate, and its rotation with its progress."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import click
import msgspec

from cli.cluster import change_cluster, get_cluster, update_cluster
from cli.connection import Connection, call
from cli.following import watch
from cli.lazy import Command
from cli.options import DURATION, detach_options, read_input
from cli.settings import settings
from swarm.clock import SECOND_NS
from swarm.errors import EXIT_NOT_CONVERGED, Invalid, Unavailable
from swarm.v1 import Cluster, Kind, ListRequest, Node, NodeState, WatchRequest

NAMES_MAX = 5  # of nodes that are waited for
_PEM_BEGIN = "-----BEGIN"


@click.command(cls=Command)
@click.option("--rotate", is_flag=True, help="Make a new root and move all nodes to it.")
@click.option("--ca-cert", default="", metavar="FILE", help="With --rotate: the new root, PEM.")
@click.option("--ca-key", default="", metavar="FILE", help="With --rotate: its key, PEM.")
@click.option("--cert-expiry", type=DURATION, help="With --rotate: lifetime of certificates.")
@click.option("--external-ca", multiple=True, metavar="CA", help="With --rotate: external CA.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@detach_options(until="all nodes have certificates of the new root")
def command(*, rotate: bool, quiet: bool, detach: bool, timeout_ns: int, **given: Any) -> int:
    """Print the cluster's root certificate, or rotate it.

    A rotation makes a new root, which the old one vouches for, and gives every node a certificate
    of it, while everything goes on. It ends, and the old root is dropped, once all nodes have one;
    nodes that are down and will not come back must be removed. Join tokens change.
    """
    if not rotate and any(value for value in given.values()):
        raise click.UsageError(
            "--ca-cert, --ca-key, --cert-expiry and --external-ca need --rotate."
        )
    if bool(given["ca_cert"]) != bool(given["ca_key"]):
        raise click.UsageError("--ca-cert and --ca-key go together.")
    pems = _pems(given)

    async def work(connection: Connection) -> tuple[str, int]:
        before = await get_cluster(connection)
        if not rotate:
            return before.root_ca_pem, 0
        assert before.spec is not None
        spec = msgspec.structs.replace(
            change_cluster(before.spec, given),
            ca_force_rotate=before.spec.ca_force_rotate + 1,
            signing_ca_cert=pems.get("ca_cert", ""),
            signing_ca_key=pems.get("ca_key", ""),
        )
        await update_cluster(connection, before, spec)
        await connection.renew()
        if detach:
            return "", 0
        display = _Display(quiet=quiet)
        try:
            async with asyncio.timeout(timeout_ns / SECOND_NS if timeout_ns else None):
                return await _rotated(connection, display), 0
        except TimeoutError:
            display.close()
            click.echo(
                f"Error: the rotation is not over yet: {display.last or 'nothing is known yet'}. "
                "It goes on by itself; nodes that will not come back are removed with `swarmctl "
                "node rm`, and `swarmctl swarm ca` shows the roots",
                err=True,
            )
            return "", EXIT_NOT_CONVERGED
        finally:
            display.close()

    pem, code = call(work)
    if pem:
        click.echo(pem, nl=not pem.endswith("\n"))
    return code


def _pems(given: dict[str, Any]) -> dict[str, str]:
    """The files that were named, by option. Raises Invalid."""
    pems = {
        name: read_input(given[name], what=name.replace("_", " ")).decode(errors="replace")
        for name in ("ca_cert", "ca_key")
        if given[name]
    }
    for name, pem in pems.items():
        if _PEM_BEGIN not in pem:
            raise Invalid(f"--{name.replace('_', '-')}: {given[name]} holds no PEM")
    return pems


async def _rotated(connection: Connection, display: _Display) -> str:
    """The root that signs once no rotation is under way; one that supersedes ours included."""
    nodes: dict[str, Node] = {}
    cluster: Cluster | None = None
    async for answer in watch(connection, WatchRequest(kinds=(Kind.CLUSTER, Kind.NODE))):
        if cluster is None:  # the watch stands: what changes from here on comes through it
            cluster = await get_cluster(connection)
            listed = await connection.control.list(ListRequest(kind=Kind.NODE))
            nodes = {o.node.id: o.node for o in listed.objects if o.node is not None}
        for event in answer.events:
            one = event.object
            if one is not None and one.cluster is not None:
                cluster = one.cluster
            elif one is not None and one.node is not None:
                if event.action == "remove":
                    nodes.pop(one.node.id, None)
                else:
                    nodes[one.node.id] = one.node
        display.show(progress(cluster, nodes))
        if not cluster.root_rotation_in_progress:
            return cluster.root_ca_pem
    raise Unavailable("the manager ended the watch; the rotation goes on by itself")


def progress(cluster: Cluster, nodes: Mapping[str, Node]) -> str:
    """How far a rotation is: "2 of 3 nodes have a certificate of the new root; waiting for n3
    (down)".
    """
    from swarm import tls  # takes a while, and only a rotation needs it

    key = tls.public_key_der(tls.load_certificates(cluster.root_ca_pem)[0])
    waiting = sorted(
        _name(node)
        for node in nodes.values()
        if node.description is None or node.description.cert_issuer_public_key != key
    )
    what = "node has" if len(nodes) == 1 else "nodes have"
    text = f"{len(nodes) - len(waiting)} of {len(nodes)} {what} a certificate of the new root"
    if waiting:
        names = ", ".join(waiting[:NAMES_MAX])
        more = len(waiting) - NAMES_MAX
        text += f"; waiting for {names}{f' and {more} more' if more > 0 else ''}"
    return text


def _name(node: Node) -> str:
    name = (node.description and node.description.hostname) or node.id
    state = node.status.state if node.status else NodeState.UNKNOWN
    return name if state is NodeState.READY else f"{name} ({state.name.lower()})"


class _Display:
    """One line on stderr that is written over on a terminal; a line for each change elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._live = settings().terminal().interactive
        self.last = ""

    def show(self, text: str) -> None:
        if text == self.last or self._quiet:
            self.last = text
            return
        if self._live:
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)
        else:
            click.echo(text, err=True)
        self.last = text

    def close(self) -> None:
        if self._live and self.last and not self._quiet:
            click.echo("", err=True)
        self._live = False
