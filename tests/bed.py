"""The test bed as a fixture: one for the whole run, its hosts made and their engines started when first asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from deploy.testbed import Bed, sweep, trouble

PREFIX = "test-"


@pytest.fixture(scope="session")
def bed() -> Iterator[Bed]:
    """`bed.docker_hosts(n)` gives n hosts with an engine and the test images; `bed.host(k)` a bare one.

    Where no bed can be made tests are skipped, in CI they fail.
    """
    if problem := trouble():
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    sweep(PREFIX)
    opened = Bed.open(f"{PREFIX}{os.getpid()}")
    try:
        yield opened
    finally:
        opened.down()
