"""The user's terminal while a remote command has it: raw mode, its size, and what is typed.

The terminal is put back the way it was whenever the block is left, also after an error.
"""

from __future__ import annotations

import asyncio
import os
import signal
import termios
import threading
import tty
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from swarm.v1 import WindowSize

__all__ = ["raw_mode", "read_chunks", "watch_size", "window_size"]

CHUNK_BYTES = 32 * 1024
CHUNKS_MAX = 16  # read ahead; then reading waits for sending


@contextmanager
def raw_mode(descriptor: int) -> Iterator[None]:
    """Every key goes to the remote command, Ctrl-C too."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def window_size(descriptor: int) -> WindowSize:
    """The terminal's size."""
    columns, rows = os.get_terminal_size(descriptor)
    return WindowSize(rows=rows, columns=columns)


@contextmanager
def watch_size(descriptor: int, changed: Callable[[WindowSize], None]) -> Iterator[None]:
    """Calls back in the running loop whenever the window's size changes."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, lambda: changed(window_size(descriptor)))
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


async def read_chunks(descriptor: int) -> AsyncIterator[bytes]:
    """What comes in on a descriptor, up to its end. Works for terminals, pipes and files alike: a
    thread reads, because epoll refuses regular files. The thread is a daemon, since a read from a
    terminal cannot be broken off.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes] = asyncio.Queue(CHUNKS_MAX)

    def read() -> None:
        while True:
            try:
                chunk = os.read(descriptor, CHUNK_BYTES)
            except OSError:
                chunk = b""  # the terminal is gone: that is its end
            try:
                asyncio.run_coroutine_threadsafe(queue.put(chunk), loop).result()
            except (RuntimeError, asyncio.CancelledError):
                return  # the loop has ended, nobody wants it any more
            if not chunk:
                return

    threading.Thread(target=read, daemon=True, name="stdin").start()
    while chunk := await queue.get():
        yield chunk
