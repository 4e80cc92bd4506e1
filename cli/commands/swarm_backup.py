"""`swarmctl swarm backup` and `swarm restore`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import click

from cli import backups
from cli.connection import Connection, call
from cli.lazy import Command
from swarm.backup import Header
from swarm.errors import Unavailable
from swarm.v1 import BackupRequest, RestoreRequest, RestoreResponse, RestoreStart

RESTORE_BYTES = 512 << 10  # in one message
_PASSPHRASE = click.option(
    "--passphrase-file",
    default="",
    metavar="FILE",
    help="Seal or open the backup with the passphrase in this file's first line.",
)


@click.command(cls=Command)
@click.option("-f", "--force", is_flag=True, help="Replace FILE if it exists.")
@_PASSPHRASE
@click.option("--verify", is_flag=True, help="Make none: check the backup in FILE, offline.")
@click.argument("file", metavar="FILE|-")
def backup(file: str, passphrase_file: str, *, force: bool, verify: bool) -> None:
    """Write the cluster's whole state to FILE, while the cluster works.

    It is the state at one moment: specs, tasks, secrets, join tokens and the keys of the cluster.
    Without a passphrase, whoever can read FILE has all of that, so it is readable by its owner
    only; keep it that way. What tasks keep in volumes is not in it. `swarm restore` reads it.
    """
    secret = backups.passphrase(passphrase_file)
    if verify:
        header = backups.verify(file, secret)
        click.echo(f"The backup is whole: {backups.summary(header)}")
        return
    with backups.Sink(file, secret, force=force) as sink:

        async def work(connection: Connection) -> Header:
            async for answer in connection.control.backup(BackupRequest()):
                sink.write(answer.data)
            return sink.done()

        header = call(work)
    sealed = "" if secret else "\nIt holds the cluster's keys and is not sealed: keep it private."
    click.echo(f"Backed up {backups.summary(header)}{sealed}", err=True)


@click.command(cls=Command)
@click.option(
    "--advertise-addr",
    default="",
    metavar="ADDR",
    help="Address others reach this node at: host[:port] (the backup's, if it is this machine's).",
)
@click.option("--data-path-addr", default="", metavar="ADDR", help="Address for tasks' traffic.")
@click.option(
    "--listen-addr",
    default="",
    metavar="ADDR",
    help="Address the manager listens on (all, with the port of --advertise-addr).",
)
@_PASSPHRASE
@click.argument("file", metavar="FILE|-")
def restore(
    file: str, advertise_addr: str, data_path_addr: str, listen_addr: str, passphrase_file: str
) -> None:
    """Make this node the manager of a cluster again, from a backup.

    The node is in no cluster, or it is the manager that wrote the backup and its state is damaged.
    Nothing is changed unless the whole backup is sound. The cluster is the same: workers come back
    by themselves if the manager's address is, and their tasks run on. What was changed after the
    backup is lost; the manager that had it must never run again.
    """
    secret = backups.passphrase(passphrase_file)
    if file != "-":
        backups.verify(file, secret)  # before anything is sent: it may be the wrong file
    start = RestoreStart(
        listen_addr=listen_addr, advertise_addr=advertise_addr, data_path_addr=data_path_addr
    )

    async def work(connection: Connection) -> RestoreResponse:
        # One message at a time: a refusal is then never lost behind what is being sent.
        answered = asyncio.Semaphore(0)
        last = RestoreResponse()
        async for answer in connection.local.restore(_messages(file, secret, start, answered)):
            last = answer
            answered.release()
        if not last.cluster_id:
            raise Unavailable("the daemon ended before the restore did; see `swarmctl info`")
        return last

    answer = call(work)
    for warning in answer.warnings:
        click.echo(f"Warning: {warning}", err=True)
    click.echo(
        f"Restored cluster {answer.cluster_id} at revision {answer.revision} (backup: "
        f"{answer.backup_revision}): this node ({answer.node_id}) is its manager, at "
        f"{answer.addr}.\n"
        "Workers that know this address come back by themselves; see `swarmctl node ls`."
    )


async def _messages(
    file: str, secret: bytes | None, start: RestoreStart, answered: asyncio.Semaphore
) -> AsyncIterator[RestoreRequest]:
    yield RestoreRequest(start=start)
    for data in backups.read(file, secret):
        for at in range(0, len(data), RESTORE_BYTES):
            await answered.acquire()
            yield RestoreRequest(data=data[at : at + RESTORE_BYTES])
    await answered.acquire()
    yield RestoreRequest(finish=True)
    await answered.acquire()
