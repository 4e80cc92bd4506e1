"""What an etcd process says: kept in a file as far as there is room, its last words in memory.

Its output comes through a pipe, not by a file that it writes itself: on a full disk its last words
would be lost, and they are what says so. Two things are learned from it that etcd tells in no other
way: that it has loaded what is on its disk and serves its peers (its socket is there long before),
and that the other members have removed this one (it ends with status 0 then). The log is zap's
JSON; what the Go runtime prints when it dies is plain text.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import IO, Final

import msgspec
import structlog

log = structlog.get_logger("store.etcd")

FILE_BYTES_MAX: Final = 16 << 20  # then it becomes the .1, and the one before that goes
LINE_BYTES_MAX: Final = 1 << 20
WORDS_MAX: Final = 400

SERVING: Final = "serving peer traffic"
REMOVED: Final = "the member has been permanently removed from the cluster"
# etcd's wrappers around the reason, which say less than nothing to who reads it.
_HOLLOW: Final = ("discovery failed", "listener failed", "server error")
_SEVERITY: Final = {"warn": 1, "error": 2, "dpanic": 3, "panic": 3, "fatal": 3}
_DIED: Final = ("panic: ", "fatal error: ", "unexpected fault address")
# A dump of etcd's own structures amid a message.
_DUMP: Final = re.compile(r"\{ClusterID:.*\}:? ")


class Said(msgspec.Struct, frozen=True):
    """One line of zap's, as far as it matters."""

    level: str = ""
    msg: str = ""
    error: str = ""
    path: str = ""

    @property
    def words(self) -> str:
        """For people."""
        parts = [self.msg] if self.msg not in _HOLLOW or not self.error else []
        if self.error:
            parts.append(_DUMP.sub("", self.error))
        text = ": ".join(parts)
        if self.path and self.path not in text:
            text += f" ({self.path})"
        return text if len(text) <= WORDS_MAX else text[: WORDS_MAX - 1] + "…"


_ZAP: Final = msgspec.json.Decoder(Said)


class Output:
    """Follows one process's output. `serving` is set once it has loaded its data; `removed`: it
    said that it is no member any more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._lost = 0
        self._worst: tuple[int, str] = (0, "")
        self._plain = self._died = ""  # the last line that is not zap's; of the Go runtime's end
        self.serving = asyncio.Event()
        self.removed = False

    async def follow(self, stream: asyncio.StreamReader) -> None:
        """Until the process closes its end."""
        rest = b""
        try:
            while chunk := await stream.read(1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._take(line)
                if len(rest) > LINE_BYTES_MAX:
                    self._take(rest)
                    rest = b""
            if rest:
                self._take(rest)
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None
            if self._lost:
                log.warning("etcd_log_incomplete", path=str(self._path), lines_lost=self._lost)

    def _take(self, line: bytes) -> None:
        self._keep(line)
        try:
            said = _ZAP.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            text = line.decode(errors="replace").strip()[:WORDS_MAX]
            if text and not self._died:
                self._plain = text
                if text.startswith(_DIED):
                    self._died = text
            return
        if said.msg == SERVING:
            self.serving.set()
        if REMOVED in said.error and said.msg == "server error":
            self.removed = True
        severity = _SEVERITY.get(said.level, 0)
        # The first of the worst: what comes after it is how the rest falls over.
        if severity >= 3 > self._worst[0] or 3 > severity >= self._worst[0]:
            self._worst = (severity, said.words)

    def _keep(self, line: bytes) -> None:
        """Appends it to the file. On a full disk lines are lost, and counted."""
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            if self._file.tell() > FILE_BYTES_MAX:
                self._file.close()
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._file = self._path.open("ab", buffering=0)
            self._file.write(line + b"\n")
        except OSError:
            self._lost += 1

    @property
    def last_words(self) -> str:
        """Why it ended, as it said itself."""
        severity, words = self._worst
        if severity >= 3:
            return words
        return self._died or words or self._plain or "it said nothing"
