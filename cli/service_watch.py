"""Following services until each has come to its end: that of a job, of a rebalance."""

from __future__ import annotations

from collections.abc import Callable

from cli.connection import Connection
from cli.following import Patience
from swarm.errors import Exhausted, NotFound, Unavailable
from swarm.v1 import Filter, GetRequest, Kind, Service, WatchRequest

__all__ = ["until_over"]


async def until_over(
    connection: Connection,
    ids: tuple[str, ...],
    over: dict[str, Service | None],
    is_over: Callable[[Service], bool],
    *,
    show: Callable[[Service], None] = lambda service: None,
) -> None:
    """Returns when all services are over; `over` has those that are, None: removed before. `show`
    is told of each as it is now. Raises Unavailable when no manager answers for long.
    """

    def note(service: Service, *, gone: bool = False) -> None:
        show(service)
        if is_over(service):
            over[service.id] = service
        elif gone:
            over[service.id] = None
        else:
            over.pop(service.id, None)  # it was begun again

    request = WatchRequest(kinds=(Kind.SERVICE,), filters=(Filter(key="id", values=ids),))
    patience = Patience()
    while True:
        lost: Unavailable | Exhausted | None = None
        stands = False
        try:
            async for answer in connection.control.watch(request):
                patience.answered()
                if not stands:
                    # Looked at once the watch stands, so that no end falls between the two.
                    stands = True
                    for id_ in ids:
                        found = await _get(connection, id_)
                        if found is None:
                            over.setdefault(id_, None)
                        else:
                            note(found)
                for event in answer.events:
                    found = event.object.service if event.object is not None else None
                    if found is not None and found.id in ids:
                        note(found, gone=event.action == "remove")
                if len(over) == len(ids):
                    return
        except (Unavailable, Exhausted) as error:
            lost = error
        await patience.wait(lost)


async def _get(connection: Connection, id_: str) -> Service | None:
    try:
        answer = await connection.control.get(GetRequest(kind=Kind.SERVICE, ref=id_))
    except NotFound:
        return None
    return answer.object.service if answer.object else None
