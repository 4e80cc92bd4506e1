"""`swarmctl swarm unlock` and `unlock-key`: managers whose keys at rest need a key of people's.

An unlock key counts once somebody has it: so each command that shows one then tells the manager.
"""

from __future__ import annotations

import sys
from functools import partial

import click

from cli.connection import Connection, call
from cli.lazy import Command
from swarm.errors import Conflict, Invalid
from swarm.v1 import GetNodeInfoRequest, GetUnlockKeyRequest, UnlockRequest

UNLOCK_S = 60.0  # seconds until the manager must serve


async def give_out(connection: Connection, *, rotate: bool = False, quiet: bool = False) -> None:
    """Shows the unlock key, and lets the managers lock with it."""
    answer = await connection.control.get_unlock_key(GetUnlockKeyRequest(rotate=rotate))
    if quiet:
        click.echo(answer.unlock_key)
    else:
        if rotate:
            click.echo("Successfully rotated manager unlock key.\n")
        click.echo(
            "To unlock a swarm manager after it restarts, run the `swarmctl swarm unlock`\n"
            "command and provide the following key:\n\n"
            f"    {answer.unlock_key}\n\n"
            "Please remember to store this key in a password manager, since without it you\n"
            "will not be able to restart the manager."
        )
    sys.stdout.flush()  # shown, before it is in force
    if not answer.in_force:
        received = GetUnlockKeyRequest(received=answer.unlock_key)
        await connection.control.get_unlock_key(received)


@click.command("unlock-key", cls=Command)
@click.option("--rotate", is_flag=True, help="Make a new key; the old one is void.")
@click.option("-q", "--quiet", is_flag=True, help="Print the key only.")
def unlock_key(*, rotate: bool, quiet: bool) -> None:
    """Show the key that unlocks managers after a restart."""
    call(partial(give_out, rotate=rotate, quiet=quiet))


@click.command("unlock", cls=Command)
def unlock() -> None:
    """Unlock the manager on this node.

    The key is asked for, or read from standard input.
    """

    async def state(connection: Connection) -> str:
        return (await connection.local.get_node_info(GetNodeInfoRequest())).state

    found = call(state)
    if found != "locked":
        raise Conflict(
            "This node is not part of a swarm" if found == "inactive" else "swarm is not locked"
        )
    key = _read_key()

    async def work(connection: Connection) -> str:
        await connection.local.unlock(UnlockRequest(unlock_key=key), timeout_s=UNLOCK_S)
        node = await connection.local.get_node_info(GetNodeInfoRequest())
        return node.error if node.state == "error" else ""

    if problem := call(work):
        click.echo(f"Warning: the node is unlocked, and does not run yet: {problem}", err=True)


def _read_key() -> str:
    if sys.stdin.isatty():
        text: str = click.prompt("Enter unlock key", hide_input=True, err=True)
    else:
        text = sys.stdin.readline()
    if not text.strip():
        raise Invalid("no unlock key was given; `swarmctl swarm unlock` reads it from its input")
    return text.strip()
