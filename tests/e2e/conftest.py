"""Whole clusters on the test bed."""

import os
from collections.abc import Iterator

import pytest

from deploy.testbed import Bed, trouble


@pytest.fixture(scope="session")
def bed() -> Iterator[Bed]:
    """Test hosts; engines are started on those that a test asks for."""
    if problem := trouble():
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    made = Bed.open(f"e2e-{os.getpid()}")
    try:
        yield made
    finally:
        made.down()
