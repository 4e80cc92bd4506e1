"""What stands on a terminal: a process on a pseudo terminal whose output an emulator (pyte) draws.

The emulator is of the same size as the pseudo terminal and is fed all that the process writes; so a
test sees what a person would see, not the bytes. The other screen (xterm's 1049), which pyte does
not know, is kept here: what stood before is shown again when the process gives the screen back.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence

import pyte

from tests.integration.cli.pty_process import PtyProcess

_SWITCH = re.compile(rb"\x1b\[\?1049([hl])")


class ScreenProcess(PtyProcess):
    """A process and the screen it draws on; a context manager."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        rows: int = 24,
        columns: int = 80,
    ) -> None:
        self._drawn = 0
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._before: object = None
        super().__init__(command, environment, rows=rows, columns=columns)

    @property
    def other_screen(self) -> bool:
        """The process has the whole screen."""
        self.lines()
        return self._before is not None

    @property
    def cursor_hidden(self) -> bool:
        self.lines()
        return bool(self._screen.cursor.hidden)

    def lines(self) -> list[str]:
        """What stands on the screen now, from the top; without spaces at the ends."""
        fresh, self._drawn = self.screen[self._drawn :], len(self.screen)
        # A sequence that is not complete waits for its rest.
        cut = re.search(rb"\x1b[^a-zA-Z]*\Z", fresh)
        if cut is not None:
            self._drawn -= len(fresh) - cut.start()
            fresh = fresh[: cut.start()]
        position = 0
        for switch in _SWITCH.finditer(fresh):
            self._stream.feed(fresh[position : switch.start()])
            position = switch.end()
            self._switched(entered=switch[1] == b"h")
        self._stream.feed(fresh[position:])
        return [line.rstrip() for line in self._screen.display]

    def _switched(self, *, entered: bool) -> None:
        if entered and self._before is None:
            self._before = copy.deepcopy((self._screen.buffer, self._screen.cursor))
        elif not entered and self._before is not None:
            self._screen.buffer, self._screen.cursor = self._before  # type: ignore[misc]  # as kept
            self._before = None

    def resize(self, rows: int, columns: int) -> None:
        if self._drawn:
            self.lines()
        self._screen.resize(rows, columns)
        # Where lines go when a terminal gets smaller differs between terminals: none stays.
        self._screen.erase_in_display(2)
        super().resize(rows, columns)

    def see(self, done: Callable[[list[str]], bool]) -> list[str]:
        """Reads until what stands on the screen satisfies the condition; the screen. Raises
        AssertionError, with the screen, at the deadline.
        """
        try:
            self.read_until(lambda _: done(self.lines()))
        except AssertionError:
            raise AssertionError("not seen; the screen is\n" + "\n".join(self.lines())) from None
        return self.lines()

    def see_text(self, text: str) -> list[str]:
        """Reads until the text stands in some line."""
        return self.see(lambda lines: any(text in line for line in lines))
