"""A process on a pseudo terminal: what a person would see and type."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

DEADLINE_S = 20.0


class PtyProcess:
    """Starts a command with all its streams on a new terminal; a context manager."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        rows: int = 24,
        columns: int = 80,
    ) -> None:
        self.screen = b""
        self._master, self.slave = pty.openpty()
        self.resize(rows, columns)
        self._process = subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env={**environment, "TERM": "xterm"},
            preexec_fn=self._take_terminal,
        )

    def _take_terminal(self) -> None:
        os.setsid()
        # A shell on a terminal gives its children this; a job in the background ignores it, and
        # what is ignored is inherited.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, data: bytes) -> None:
        os.write(self._master, data)

    def read_until(self, done: Callable[[bytes], bool]) -> bytes:
        """Reads until the screen satisfies the condition. Raises AssertionError at the deadline."""
        end = time.monotonic() + DEADLINE_S
        while not done(self.screen):
            left = end - time.monotonic()
            assert left > 0, f"not seen within {DEADLINE_S} s: {self.screen[-2000:]!r}"
            if select.select([self._master], [], [], min(left, 0.2))[0]:
                try:
                    self.screen += os.read(self._master, 65536)
                except OSError:  # the other end is closed
                    assert done(self.screen), self.screen
        return self.screen

    def expect(self, text: bytes) -> bytes:
        return self.read_until(lambda screen: text in screen)

    def wait(self) -> int:
        """The exit code; what is still printed is read meanwhile."""
        end = time.monotonic() + DEADLINE_S
        while self._process.poll() is None:
            assert time.monotonic() < end, f"does not end: {self.screen[-2000:]!r}"
            if select.select([self._master], [], [], 0.05)[0]:
                self.screen += os.read(self._master, 65536)
        while select.select([self._master], [], [], 0)[0]:
            self.screen += os.read(self._master, 65536)
        return self._process.returncode

    def interrupt(self) -> None:
        """What the terminal does on Ctrl-C."""
        os.killpg(self._process.pid, signal.SIGINT)

    def kill(self, number: signal.Signals) -> None:
        """Sends a signal to the process alone."""
        self._process.send_signal(number)

    def kill_thread(self, number: signal.Signals) -> None:
        """Sends a signal in such a way that one of its threads beside the main one gets it."""
        main = self._process.pid
        threads = {int(name) for name in os.listdir(f"/proc/{main}/task")} - {main}
        os.kill(min(threads), number)

    def modes(self) -> list[object]:
        """The terminal's settings."""
        return termios.tcgetattr(self.slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(DEADLINE_S)
        os.close(self._master)
        os.close(self.slave)
