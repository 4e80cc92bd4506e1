"""Ends a command whose reader is gone, also while it has nothing to write.

`swarmctl logs -f web | head -1` is to end with head, and not with the next line that web prints.
GNU tail -f does the same, by the same means: a pipe that nobody reads any more says so as
an error condition of its writing end.
"""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["until_unread"]


@contextmanager
def until_unread() -> Iterator[None]:
    """Raises BrokenPipeError in the block, by cancelling its task, once nobody reads standard
    output.
    """
    descriptor = sys.stdout.fileno()
    kind = os.fstat(descriptor).st_mode
    task = asyncio.current_task()
    if task is None or not stat.S_ISFIFO(kind):
        yield
        return
    loop = asyncio.get_running_loop()
    gone = False

    def look() -> None:
        nonlocal gone
        loop.remove_reader(watched)
        gone = True
        task.cancel()

    # A descriptor of its own: the loop wants each one once, and stdout may be stdin as well.
    watched = os.dup(descriptor)
    try:
        # A pipe's writing end has nothing to read; epoll tells its errors to whoever waits for it.
        loop.add_reader(watched, look)
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise BrokenPipeError("nobody reads standard output any more") from None
    finally:
        loop.remove_reader(watched)
        os.close(watched)
