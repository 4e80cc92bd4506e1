"""A network that can be cut, between a client and a TCP server on the loopback.

What is sent over a cut is held, not lost, and arrives when it is healed, as TCP's repetitions would
bring it. Connections stay open over a cut; those who use them find out by their own time limits.
"""

from __future__ import annotations

import asyncio
import contextlib

CHUNK_BYTES = 64 << 10


class Forwarder:
    """Listens on a port of its own and passes everything on to `target` ("host:port")."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.endpoint = ""
        self.delay_s = 0.0  # of every chunk, each way
        self._open = {"up": asyncio.Event(), "down": asyncio.Event()}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.heal()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.endpoint = f"{host}:{port}"

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, *, up: bool = True, down: bool = True) -> None:
        """`up`: what goes to the server; `down`: what comes from it."""
        for name, chosen in (("up", up), ("down", down)):
            if chosen:
                self._open[name].clear()

    def heal(self) -> None:
        self.delay_s = 0.0
        for event in self._open.values():
            event.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        host, _, port = self.target.rpartition(":")
        server: asyncio.StreamWriter | None = None
        # Whatever ends one side ends the other.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                answers, server = await asyncio.open_connection(host, int(port))
                ways = {
                    asyncio.ensure_future(self._pass(reader, server, "up")),
                    asyncio.ensure_future(self._pass(answers, writer, "down")),
                }
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
            finally:
                for side in (writer, server):
                    if side is not None:
                        side.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str
    ) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._open[way].wait()
            writer.write(chunk)
            await writer.drain()
