"""What logging promises to those who call it."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator

import pytest
import structlog

from swarm import logs


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


class Full(io.StringIO):
    """A log file on a disk without room."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_under_the_log_ends_nobody() -> None:
    logs.configure(stream=Full())
    log = structlog.get_logger("test")
    log.error("something_happened", number=1)
    try:
        raise ValueError("a defect")
    except ValueError:
        log.exception("defect")
