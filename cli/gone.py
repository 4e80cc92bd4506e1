"""Waiting until an object no longer exists."""

from __future__ import annotations

from cli.connection import Connection
from cli.following import Patience
from swarm.errors import Exhausted, NotFound, Unavailable
from swarm.v1 import Filter, GetRequest, Kind, WatchRequest

__all__ = ["wait_gone"]


async def wait_gone(connection: Connection, kind: Kind, id_: str) -> None:
    """Returns once no object of the kind has the id. Raises Unavailable when no manager answers for
    long.
    """
    patience = Patience()
    while True:
        lost: Unavailable | Exhausted | None = None
        try:
            if await _seen_gone(connection, kind, id_):
                return
            patience.answered()  # the watch ended, as it does when the manager stops
        except NotFound:
            return
        except (Unavailable, Exhausted) as error:
            lost = error
        await patience.wait(lost)


async def _seen_gone(connection: Connection, kind: Kind, id_: str) -> bool:
    """Whether a watch saw the object go. The object is looked for once the watch stands, so its
    removal cannot fall between the two. Raises NotFound when it is gone already.
    """
    filters = (Filter(key="action", values=("remove",)), Filter(key="id", values=(id_,)))
    stands = False
    async for answer in connection.control.watch(WatchRequest(kinds=(kind,), filters=filters)):
        if not stands:
            stands = True
            await connection.control.get(GetRequest(kind=kind, ref=id_))
        if answer.events:
            return True
    return False
