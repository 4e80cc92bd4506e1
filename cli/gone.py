"""Waiting until an object no longer exists."""

from __future__ import annotations

import asyncio

from cli.connection import Connection
from swarm.errors import Exhausted, NotFound, NotManager, Unavailable
from swarm.v1 import Filter, GetRequest, Kind, WatchRequest

__all__ = ["wait_gone"]

LOST_S = 30.0  # how long a manager may be gone before waiting is given up
RETRY_S = 0.5


async def wait_gone(connection: Connection, kind: Kind, id_: str) -> None:
    """Returns once no object of the kind has the id. Raises Unavailable when no manager answers for
    long.
    """
    loop = asyncio.get_running_loop()
    lost_s: float | None = None
    while True:
        try:
            if await _seen_gone(connection, kind, id_):
                return
            lost_s = None  # the watch ended, as it does when the manager stops
        except NotFound:
            return
        except NotManager:
            raise
        except (Unavailable, Exhausted):
            lost_s = loop.time() if lost_s is None else lost_s
            if loop.time() - lost_s > LOST_S:
                raise
        await asyncio.sleep(RETRY_S)


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
