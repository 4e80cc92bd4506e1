"""What is typed is read by a thread, which ends without a word."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from cli.terminal import CHUNK_BYTES, CHUNKS_MAX, read_chunks


def test_the_loop_may_end_while_what_was_read_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    readers: list[threading.Thread] = []
    (tmp_path / "file").write_bytes(bytes(2 * CHUNKS_MAX * CHUNK_BYTES))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)

    async def read_one() -> None:
        chunks = aiter(read_chunks(descriptor))
        assert len(await anext(chunks)) == CHUNK_BYTES
        readers.extend(t for t in threading.enumerate() if t.name == "stdin")
        async with asyncio.timeout(10):
            # One was taken, and the queue is full.
            while os.lseek(descriptor, 0, os.SEEK_CUR) < (CHUNKS_MAX + 1) * CHUNK_BYTES:
                await asyncio.sleep(0.01)

    asyncio.run(read_one())
    for reader in readers:
        reader.join(10)
    os.close(descriptor)
    assert readers and not raised
