"""Managers that answer late."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import FakeCluster

LATE_S = 0.7


@contextmanager
def late_door(path: Path, behind: Path) -> Iterator[None]:
    """A socket that takes connections to the one behind it, and lets nothing through for a while:
    as a busy machine, or one far away, does.
    """

    def carry(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            return  # the other side is gone
        finally:
            sink.close()

    def serve() -> None:
        while True:
            try:
                visitor, _ = door.accept()
            except OSError:
                return
            time.sleep(LATE_S)  # what is tested
            inner = socket.socket(socket.AF_UNIX)
            inner.connect(str(behind))
            for pair in ((visitor, inner), (inner, visitor)):
                threading.Thread(target=carry, args=pair, daemon=True).start()

    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            door.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=10)


def test_a_manager_that_answers_late_is_waited_for(
    cli: Cli, cluster: FakeCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "door.sock"
    with late_door(path, cli.socket):
        answer = Cli(path, cli.config, capfd)("node", "ls", "-q")
    assert (answer.code, answer.err) == (0, "")
