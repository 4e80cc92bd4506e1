"""The manager part: what is tried again, what is told, and what it is given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent import managing
from agent.managing import Demoted
from swarm import errors
from tests.fakes.waiting import until
from tests.unit.agent.parts import Here


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(managing, "RETRY_S_MIN", 0.01)


@asynccontextmanager
async def running(here: Here) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(here.managing.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    "error",
    [
        errors.Unavailable("the port is taken"),
        errors.TimedOut("etcd is slow"),
        errors.Exhausted("another one is coming in"),
        ExceptionGroup("", [errors.Unavailable("the disk is full")]),
        ZeroDivisionError(),
    ],
    ids=lambda e: type(e).__name__,
)
async def test_what_may_pass_is_tried_again_until_it_serves(
    tmp_path: Path, error: Exception
) -> None:
    here = Here(tmp_path, error, error)
    async with running(here):
        await until(lambda: here.managing.serving)
        assert here.part.made == 3
        assert not here.managing.problem and not here.managing.lasting
        assert here.managing.manager() is here.part
    assert here.part.stopped == 1 and not here.managing.serving


async def test_what_does_not_pass_is_told_and_waits(tmp_path: Path) -> None:
    here = Here(tmp_path, errors.Unsupported("there is no etcd"))
    async with running(here) as task:
        await here.managing.settled.wait()
        await asyncio.sleep(0.05)
        assert here.part.made == 1 and not task.done()
        assert here.managing.lasting and here.managing.problem == "there is no etcd"
        assert isinstance(here.managing.cause, errors.Unsupported)
        with pytest.raises(errors.Unavailable, match="there is no etcd"):
            here.managing.manager()
    assert not here.managing.problem


async def test_one_that_fails_while_it_serves_is_started_again(tmp_path: Path) -> None:
    here = Here(tmp_path)
    async with running(here):
        await until(lambda: here.managing.serving)
        here.part.end(errors.Unavailable("etcd has ended"))
        await until(lambda: here.part.started == 2 and here.managing.serving)
        here.part.end()  # it asks for a new beginning
        await until(lambda: here.part.started == 3 and here.managing.serving)
        assert here.part.stopped == 2


async def test_one_that_waits_for_others_says_so_and_goes_on_waiting(tmp_path: Path) -> None:
    here = Here(tmp_path)
    here.part.waits = "too few managers are there"
    async with running(here):
        await here.managing.settled.wait()
        assert here.managing.problem == "too few managers are there"
        assert not here.managing.serving and not here.managing.lasting
        assert here.managing.waiting and here.managing.standing() is None


async def test_a_demotion_ends_it(tmp_path: Path) -> None:
    here = Here(tmp_path)
    async with running(here) as task:
        await until(lambda: here.managing.serving)
        here.part.end(ExceptionGroup("", [Demoted("removed"), errors.Unavailable("closed")]))
        with pytest.raises(Demoted, match="removed"):
            await task
    assert here.part.stopped == 1 and here.managing.part is None


async def test_one_that_is_refused_asks_what_the_node_is_and_tries_again(tmp_path: Path) -> None:
    here = Here(tmp_path, errors.Denied("it is not a manager"))
    async with running(here):
        await until(lambda: here.managing.serving)
    assert here.denied == 1


async def test_a_node_that_was_removed_does_not_try_again(tmp_path: Path) -> None:
    here = Here(tmp_path, errors.Removed("this node was removed"))
    async with running(here):
        await here.managing.settled.wait()
        assert here.managing.lasting and here.denied == 0


async def test_standing_counts_managers_and_those_that_are_reached(tmp_path: Path) -> None:
    here = Here(tmp_path)
    here.part.reachable = [True, False, True]
    async with running(here):
        await until(lambda: here.managing.serving)
        standing = here.managing.standing()
        assert standing is not None
        assert (standing.reachable, standing.total, standing.in_touch) == (2, 3, True)
