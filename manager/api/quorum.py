"""What is said when the managers do not agree on anything any more: who can be reached, how many
it takes, and what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from manager.api.lookup import name_of
from manager.store import View
from swarm import errors
from swarm.tls import split_address
from swarm.v1 import Node

__all__ = ["Answers", "answers", "explained", "while_in_touch"]

PROBE_S = 1.0
TOUCH_CHECK_S = 1.0  # how often a watch looks whether its manager is in touch

Answers = Callable[[str], Awaitable[bool]]
R = TypeVar("R")


async def answers(address: str) -> bool:
    """Whether something listens at host:port."""
    try:
        async with asyncio.timeout(PROBE_S):
            _, writer = await asyncio.open_connection(*split_address(address))
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def explained(
    view: View, error: errors.SwarmError, *, node_id: str, answers: Answers
) -> errors.SwarmError:
    """The error with what it comes from; the same where there is one manager. `node_id`: of the
    manager that is asked.
    """
    others = sorted(
        (n for n in view.all(Node) if n.manager_status is not None and n.id != node_id),
        key=name_of,
    )
    if not others:
        return error
    found = await asyncio.gather(*(answers(_addr(n)) for n in others))
    gone = [n for n, there in zip(others, found, strict=True) if not there]
    count, reached = len(others) + 1, len(others) + 1 - len(gone)
    needed = count // 2 + 1
    if reached >= needed:
        why = (
            f"{reached} of the {count} managers can be reached from here, which is enough "
            f"({needed}): they are electing a leader, or do not reach each other; try again"
        )
        return type(error)(f"{error.message}; {why}")
    names = ", ".join(f"{name_of(n)} at {_addr(n)}" for n in gone)
    what = (
        "the swarm does not have a leader: too few managers are online. "
        f"{reached} of {count} can be reached from here, and it takes {needed}; gone: {names}. "
        "Start swarmd there again; what runs goes on meanwhile, and `swarmctl --stale` shows what "
        "this manager knew last. If they are gone for good, run `swarmctl swarm init "
        "--force-new-cluster` on this node"
    )
    if isinstance(error, errors.TimedOut):
        what = f"{error.message}; {what}"
    return type(error)(what)


async def while_in_touch(
    responses: AsyncGenerator[R, None],
    *,
    in_touch: Callable[[], bool],
    explained: Callable[[errors.SwarmError], Awaitable[errors.SwarmError]],
) -> AsyncGenerator[R, None]:
    """What a watch tells, for as long as this manager is in touch with the others: one that is not
    would be silent, and nobody could tell it from one that has nothing to tell. Raises Unavailable.
    """
    async with aclosing(responses):
        while True:
            following = asyncio.ensure_future(anext(responses, None))
            try:
                while not following.done():
                    await asyncio.wait({following}, timeout=TOUCH_CHECK_S)
                    if not in_touch():
                        lost = errors.Unavailable("this manager has lost touch with the others")
                        raise await explained(lost)
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
            response = following.result()
            if response is None:
                return
            yield response


def _addr(node: Node) -> str:
    return node.manager_status.addr if node.manager_status is not None else ""
