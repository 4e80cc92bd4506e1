"""What all tests share."""

import asyncio
import os
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.bed import bed as bed  # the fixture, for integration and e2e

# Shared machines are slow at times; a slow example is no failure.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")
# Tests ask no registry what a tag stands for, but those that are about it.
os.environ["SWARM_RESOLVE_IMAGE"] = "never"


@pytest.fixture(scope="session", autouse=True)
def _no_loop_of_nobody():
    """Python 3.11 makes an event loop when asked for the current one, and nobody would close it.

    pytest-asyncio asks before each asynchronous test. Having said None once makes it an error
    there, which pytest-asyncio takes as "there is none".
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.set_event_loop(None)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    """Beside each other the long files begin first, so that none is left over at the end."""
    if hasattr(config, "workerinput"):
        order = {"sim": 0, "e2e": 1, "integration": 2}
        folder = Path(__file__).parent
        items.sort(key=lambda i: order.get(i.path.relative_to(folder).parts[0], 3))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """In CI nothing may be missing: a test that would be skipped fails, with the reason."""
    outcome = yield
    report = outcome.get_result()
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which CI does not allow: {report.longrepr}"
