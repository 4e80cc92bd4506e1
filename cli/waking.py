"""Signals wake the event loop, at whatever moment they come.

Python only notes a signal when it comes, and handles it between two of its own steps. One that
comes when the loop is just about to wait, or that the kernel gives to another thread (gRPC has
some), would wait with the loop until something else happens: Ctrl-C would do nothing while logs are
followed that say nothing. What Python writes to the wake-up descriptor ends the loop's wait.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["woken_by_signals"]


@contextmanager
def woken_by_signals() -> Iterator[None]:
    """For the loop that runs; does nothing outside the main thread, which alone handles signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    reads, writes = socket.socketpair()
    with reads, writes:
        reads.setblocking(False)
        writes.setblocking(False)
        before = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
        # The handlers run before what was written is read.
        loop.add_reader(reads, reads.recv, 4096)
        try:
            yield
        finally:
            loop.remove_reader(reads)
            signal.set_wakeup_fd(before)
