"""What logging promises to those who call it."""

from __future__ import annotations

import errno
import io
import logging
from collections.abc import Iterator

import pytest
import structlog

from swarm import logs


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)


class Full(io.StringIO):
    """A log file on a disk without room."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_under_the_log_ends_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(stream=Full())
    logging.getLogger("library").error("says something as well")
    assert capsys.readouterr().err == ""
    log = structlog.get_logger("test")
    log.error("something_happened", number=1)
    try:
        raise ValueError("a defect")
    except ValueError:
        log.exception("defect")
