"""The user's terminal while a command has it: raw mode for `exec -it`, the whole screen for `top`;
its size, and what is typed.

The terminal is put back the way it was whenever the block is left: at its end, after an error, and
also before a signal ends or stops the process (`lent`). Only SIGKILL leaves it as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import termios
import threading
import tty
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from swarm.v1 import WindowSize

__all__ = ["lent", "raw_mode", "read_chunks", "watch_size", "whole_screen", "window_size", "write"]

CHUNK_BYTES = 32 * 1024
CHUNKS_MAX = 16  # read ahead; then reading waits for sending
SIZE_UNKNOWN = (80, 24)
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# xterm's control sequences: the other screen, which has no history, without a cursor, and without
# folding long lines; and back again.
_ENTER = b"\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
_LEAVE = b"\x1b[?7h\x1b[?25h\x1b[?1049l"


@contextmanager
def lent(take: Callable[[], None], give_back: Callable[[], None]) -> Iterator[None]:
    """`take` changes the terminal, `give_back` restores it; both may be called again. Signals that
    end the process restore it first, and so does one that stops it, after which it is taken again.
    For the main thread.
    """

    def end(number: int, _: FrameType | None) -> None:
        give_back()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def stop(number: int, _: FrameType | None) -> None:
        give_back()
        signal.signal(number, signal.SIG_DFL)
        # The process stops in this line, and goes on in the next when it is continued.
        os.kill(os.getpid(), number)
        signal.signal(number, stop)
        take()

    def go_on(number: int, _: FrameType | None) -> None:
        # Also after SIGSTOP, which nobody is told of: a shell has changed the terminal meanwhile.
        take()

    handlers = {signal.SIGTSTP: stop, signal.SIGCONT: go_on} | dict.fromkeys(ENDING, end)
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        # What is ignored (nohup) stays so.
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        take()
        yield
    finally:
        give_back()
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextmanager
def raw_mode(descriptor: int) -> Iterator[None]:
    """Every key goes to the remote command, Ctrl-C too."""
    before = termios.tcgetattr(descriptor)
    with lent(lambda: _raw(descriptor), lambda: _restored(descriptor, before)):
        yield


def _raw(descriptor: int) -> None:
    with contextlib.suppress(termios.error):  # the terminal may be gone: then nothing is to be done
        # Not TCSAFLUSH, which would throw away what was typed ahead.
        tty.setraw(descriptor, termios.TCSANOW)


def _restored(descriptor: int, modes: list[object]) -> None:
    with contextlib.suppress(termios.error):
        # Not TCSADRAIN: a terminal that nobody reads would hold the process.
        termios.tcsetattr(descriptor, termios.TCSANOW, modes)  # type: ignore[arg-type]  # tcgetattr's own


@contextmanager
def whole_screen(keys: int | None, screen: int, again: Callable[[], None]) -> Iterator[None]:
    """The terminal's whole screen, and its keys one by one without echo; Ctrl-C and Ctrl-Z are
    signals still. `again` is called when the screen was given back meanwhile, and is empty.
    """
    before = termios.tcgetattr(keys) if keys is not None else []

    def take() -> None:
        if keys is not None:
            modes = termios.tcgetattr(keys)
            # Without flow control: a screen that stands still because of Ctrl-S would not end.
            modes[0] &= ~(termios.IXON | termios.ICRNL)
            modes[3] &= ~(termios.ECHO | termios.ICANON)
            modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
            with contextlib.suppress(termios.error):
                termios.tcsetattr(keys, termios.TCSANOW, modes)
        write(screen, _ENTER)
        again()

    def give_back() -> None:
        write(screen, _LEAVE)
        if keys is not None:
            _restored(keys, before)

    with lent(take, give_back):
        yield


def write(descriptor: int, data: bytes) -> None:
    """All of it; a terminal that is gone takes anything."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [], 1.0)
        except OSError:
            return


def window_size(descriptor: int) -> WindowSize:
    """The terminal's size; 24 lines of 80 where it does not tell."""
    columns, rows = os.get_terminal_size(descriptor)
    return WindowSize(rows=rows or SIZE_UNKNOWN[1], columns=columns or SIZE_UNKNOWN[0])


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
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    room = threading.Semaphore(CHUNKS_MAX)  # in the queue
    over = threading.Event()

    def read() -> None:
        chunk = b"unknown"
        while chunk and room.acquire() and not over.is_set():
            try:
                chunk = os.read(descriptor, CHUNK_BYTES)
            except OSError:
                chunk = b""  # the terminal is gone: that is its end
            # Not a coroutine, which an ending loop would complain of.
            with contextlib.suppress(RuntimeError):  # it has ended, nobody wants it any more
                loop.call_soon_threadsafe(queue.put_nowait, chunk)

    threading.Thread(target=read, daemon=True, name="stdin").start()
    try:
        while chunk := await queue.get():
            room.release()
            yield chunk
    finally:
        over.set()
        room.release()
