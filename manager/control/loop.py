"""The control loop: takes changes from the store, runs ticks at its own pace, commits each once.

One loop in place of SwarmKit's dozen: `reconcile -> place` over one draft and one commit, fenced by
the leadership, so that a deposed leader writes nothing. Changes only mark work dirty; what piles up
during a commit is worked off together by the next tick. It holds `store.task_writer` from draft to
commit, so that it and the dispatcher's status batches do not make each other stale.
"""

from __future__ import annotations

import asyncio

import structlog

from manager.control import metrics
from manager.control.controller import Controller
from manager.store import Fence, Stale, Store, Watch, WatchLost
from swarm import errors, ids
from swarm.clock import SECOND_NS, Clock

log = structlog.get_logger("control")

IDLE_S_MAX = 60.0  # sleeps no longer than this, in case the clock is set
BACKOFF_S_MIN = 0.005
BACKOFF_S_MAX = 2.0
# After a long tick the loop lets others run for as long as the tick took, up to this.
PAUSE_S_MAX = 0.5


class ControlLoop:
    """Runs on the leader alone. `run` until cancelled."""

    def __init__(self, store: Store, clock: Clock, rng: ids.Rng, *, fence: Fence) -> None:
        self._store = store
        self._clock = clock
        self._rng = rng
        self._fence = fence
        self._controller = Controller(rng, on_defect=_note_defect)
        self._own: set[int] = set()  # revisions of own commits that were not observed yet
        self._resync = False

    async def run(self) -> None:
        """Keeps the cluster as its specs say, until cancelled. Errors of the store are waited out;
        a loss of leadership shows as Stale commits, which write nothing.
        """
        while True:
            with self._store.watch(("all",)) as watch:
                self._controller.reset(self._store)
                self._own.clear()
                self._resync = False
                try:
                    await self._follow(watch)
                except WatchLost as lost:
                    log.warning("control_watch_lost", reason=str(lost))
            metrics.RESYNCS.inc()

    async def _follow(self, watch: Watch) -> None:
        """Ticks until the watch is lost or the state has to be read afresh."""
        failures = 0
        while not self._resync:
            await self._wait(watch)
            await self._drain(watch)
            if not self._controller.has_work(self._clock.now_ns()):
                continue
            started_s = self._clock.monotonic_s()
            if await self._tick(watch):
                failures = 0
                spent_s = self._clock.monotonic_s() - started_s
                await asyncio.sleep(min(spent_s, PAUSE_S_MAX))
            else:
                failures += 1
                backoff_s = min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2 ** min(failures, 16))
                await asyncio.sleep(backoff_s * (0.5 + self._rng.random()))

    async def _wait(self, watch: Watch) -> None:
        """Until there is something to do or to hear."""
        now_ns = self._clock.now_ns()
        if self._controller.has_work(now_ns) or watch.pending:
            return
        wake_ns = self._controller.next_wake_ns()
        wait_s = IDLE_S_MAX if wake_ns is None else (wake_ns - now_ns) / SECOND_NS
        try:
            async with asyncio.timeout(min(wait_s, IDLE_S_MAX)):
                await self._take(watch)
        except TimeoutError:
            return

    async def _drain(self, watch: Watch) -> None:
        """Takes all that waits, without waiting: afterwards controller and store agree."""
        while watch.pending:
            await self._take(watch)

    async def _take(self, watch: Watch) -> None:
        try:
            batch = await anext(watch)
        except StopAsyncIteration:
            raise errors.Unavailable("the store was closed under the control loop") from None
        own = batch.revision in self._own
        self._own.discard(batch.revision)
        for change in batch.changes:
            self._controller.observe(change, self._store, own=own)

    async def _tick(self, watch: Watch) -> bool:
        """One tick and its commit; False: it was not committed."""
        async with self._store.task_writer:
            await self._drain(watch)
            controller = self._controller
            metrics.SERVICES_DIRTY.set(len(controller.dirty))
            draft = self._store.draft()
            with metrics.TICK_SECONDS.time():
                tick = controller.tick(draft)
            try:
                before = self._store.revision
                with metrics.COMMIT_SECONDS.time():
                    revision = await self._store.commit(draft, fence=self._fence)
            except BaseException as error:
                controller.undo(self._store)
                if not isinstance(error, errors.SwarmError):
                    raise
                self._note(error)
                return False
            controller.done()
        if revision > before:
            self._own.add(revision)
            metrics.COMMITS.labels("done").inc()
        metrics.TASKS_PLACED.inc(tick.placed)
        await self._drain(watch)
        metrics.TASKS_PENDING.set(controller.pending)
        metrics.SERVICES_DIRTY.set(len(controller.dirty))
        return True

    def _note(self, error: errors.SwarmError) -> None:
        match error:
            case Stale():
                metrics.COMMITS.labels("stale").inc()
                log.debug("control_commit_stale", reason=error.message)
            case errors.Unavailable():
                metrics.COMMITS.labels("unavailable").inc()
                log.warning("control_commit_unavailable", reason=error.message)
            case errors.TimedOut():
                # It may have been written: what was taken back may have to be taken again.
                metrics.COMMITS.labels("unavailable").inc()
                log.warning("control_commit_timed_out", reason=error.message)
                self._resync = True
            case _:
                raise error


def _note_defect(service_id: str, error: Exception) -> None:
    """One service that cannot be worked out is not to stop the others."""
    metrics.DEFECTS.inc()
    log.error("control_service_failed", service=service_id, exc_info=error)
