"""An event loop with virtual time, and processes on it that can be paused and killed.

Time stands still while there is anything to do, and then jumps to the next timer, so a run depends
on its seed alone: not on the machine's speed, not on hashes (tasks are hashed in the order in which
they were made). A process is a context: whatever a process starts belongs to it. What a paused
process would do next waits for its return; a killed one does nothing any more, `finally` included,
as after SIGKILL. Callbacks of no process belong to the outside: networks, disks, container engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
import sys
from asyncio import events
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextvars import Context, ContextVar, copy_context
from enum import IntEnum
from functools import partial
from typing import Any, TypeVar

from swarm.clock import SECOND_NS

T = TypeVar("T")

EPOCH_NS = 1_700_000_000 * SECOND_NS
# So many callbacks without time going on: somebody runs in circles.
BUSY_MAX = 300_000


class Life(IntEnum):
    RUNS = 0
    PAUSED = 1
    DEAD = 2


class Proc:
    """One process. `on_death` is called, outside of it, when it was killed or has ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.life = Life.RUNS
        self.held: list[Handle] = []  # what it would have done since it was paused, or is dead
        self.tasks: list[asyncio.Task[Any]] = []  # of a dead one
        self.on_death: list[Callable[[], None]] = []

    @property
    def alive(self) -> bool:
        return self.life != Life.DEAD


PROC: ContextVar[Proc | None] = ContextVar("PROC", default=None)
# What happens outside of all processes happens in copies of this.
OUTSIDE = Context()


class Handle:
    """A callback and its time; see asyncio.TimerHandle."""

    __slots__ = ("args", "at_s", "callback", "context", "dropped")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: Context, at_s: float
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.at_s = at_s
        self.dropped = False

    def cancel(self) -> None:
        self.dropped = True

    def cancelled(self) -> bool:
        return self.dropped

    def when(self) -> float:
        return self.at_s


class SimTask(asyncio.Task[Any]):
    """A task whose place in a set depends on when it was made, not on where it lies in memory."""

    def __init__(
        self, coro: Coroutine[Any, Any, Any], *, loop: SimLoop, context: Context | None
    ) -> None:
        loop.made += 1
        self.number = loop.made
        self.proc = PROC.get() if context is None else context.get(PROC)
        super().__init__(coro, loop=loop, context=context, name="sim")

    def __hash__(self) -> int:
        return self.number


class SimLoop(asyncio.AbstractEventLoop):
    """See the module. `run_until` is called from outside, with no other loop running."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.made = 0  # tasks
        self.callbacks = 0
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._number = 0
        self._watched = False  # some process was paused or killed
        self._closed = False
        self._halted = False
        # What no one caught, by process.
        self.on_defect: Callable[[str, BaseException | None, str], None] = lambda *_: None

    # -------------------------------------------------------------- asyncio's side

    def time(self) -> float:
        return self.now_s

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return events._get_running_loop() is self

    def is_closed(self) -> bool:
        return self._closed

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]  # coroutines alone
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: object = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        return SimTask(coro, loop=self, context=context)

    def call_soon(  # type: ignore[override]  # a handle of our own
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        handle = Handle(callback, args, copy_context() if context is None else context, self.now_s)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]  # there are no threads

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> Handle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> Handle:
        handle = Handle(callback, args, copy_context() if context is None else context, when)
        self._number += 1
        heapq.heappush(self._timers, (when, self._number, handle))
        return handle

    async def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> T:
        """At once and here: a thread would bring the machine's time with it."""
        await asyncio.sleep(0)
        return func(*args)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        proc = PROC.get()
        self.on_defect(
            proc.name if proc else "outside", context.get("exception"), str(context.get("message"))
        )

    # -------------------------------------------------------------- processes

    def spawn(self, proc: Proc | None, coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a task in a process, or outside of all."""
        context = OUTSIDE.copy()
        context.run(PROC.set, proc)
        return self.create_task(coro, context=context)

    def outside(self, delay_s: float, callback: Callable[..., object], *args: Any) -> Handle:
        """Calls it later, outside of all processes."""
        return self.call_at(self.now_s + delay_s, callback, *args, context=OUTSIDE.copy())

    def kill(self, proc: Proc) -> None:
        """It does nothing any more."""
        if proc.life == Life.DEAD:
            return
        self._watched = True
        proc.life = Life.DEAD
        # Were they let go of, Python would run their `finally`.
        proc.tasks = [t for t in asyncio.all_tasks(self) if getattr(t, "proc", None) is proc]
        for callback in proc.on_death:
            self.outside(0, callback)

    def pause(self, proc: Proc) -> None:
        if proc.life == Life.RUNS:
            self._watched = True
            proc.life = Life.PAUSED

    def resume(self, proc: Proc) -> None:
        """It goes on with all that would have happened meanwhile, in order."""
        if proc.life == Life.PAUSED:
            proc.life = Life.RUNS
            self._ready.extend(proc.held)
            proc.held = []

    # -------------------------------------------------------------- running

    def halt(self) -> None:
        """`run_until` returns after this callback."""
        self._halted = True

    def run_until(self, until_s: float, *, idle: Callable[[], bool] | None = None) -> None:
        """Runs until that time, `halt`, or `idle` says so when time is about to go on."""
        ready, timers = self._ready, self._timers
        self._halted = False
        busy = 0
        before = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=None, finalizer=self._finalize)
        events._set_running_loop(self)
        try:
            while not self._halted:
                while ready:
                    self._call(ready.popleft())
                    busy += 1
                    if self._halted:
                        break
                    if busy > BUSY_MAX:
                        raise RuntimeError(f"busy without end at {self.now_s:.3f} s")
                self.callbacks += busy
                busy = 0
                while timers and timers[0][2].dropped:
                    heapq.heappop(timers)
                if self._halted or (idle is not None and idle()):
                    return
                if not timers or timers[0][0] > until_s:
                    self.now_s = until_s
                    return
                self.now_s = max(self.now_s, timers[0][0])
                while timers and timers[0][0] <= self.now_s:
                    ready.append(heapq.heappop(timers)[2])
        finally:
            events._set_running_loop(None)
            sys.set_asyncgen_hooks(*before)

    def _call(self, handle: Handle) -> None:
        if handle.dropped:
            return
        context = handle.context
        if self._watched:
            proc = context.get(PROC)
            if proc is not None and proc.life:
                proc.held.append(handle)
                return
        try:
            context.run(handle.callback, *handle.args)
        except Exception as error:
            proc = context.get(PROC)
            self.on_defect(proc.name if proc else "outside", error, "in a callback")

    def _finalize(self, generator: AsyncGenerator[Any, Any]) -> None:
        """A generator that nobody iterates any more is closed, as asyncio does."""
        if not self._closed:
            self.call_soon(self.create_task, generator.aclose())

    def bury(self, procs: list[Proc]) -> None:
        """The end of a run: lets everything, the dead included, come to its end in order, so that
        nothing is left for the collector to stumble over.
        """
        self.on_defect = lambda *_: None
        for proc in procs:
            proc.life = Life.RUNS
            self._ready.extend(proc.held)
            proc.held = []
        self._watched = False
        tasks = [t for t in asyncio.all_tasks(self) if isinstance(t, SimTask)]
        for _ in range(3):
            for task in sorted(tasks, key=lambda t: t.number):
                task.cancel()
            self.run_until(self.now_s + 200, idle=partial(_all_done, tasks))
            tasks = [t for t in asyncio.all_tasks(self) if isinstance(t, SimTask)]
            if not tasks:
                break
        self._closed = True
        self._ready.clear()
        self._timers.clear()
        if not tasks:
            return
        with _silent():
            for task in tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                for _ in range(9):  # one that awaits in its clean-up has to be asked again
                    with contextlib.suppress(BaseException):
                        task.get_coro().close()
                        break
            del tasks
            gc.collect()


def _all_done(tasks: list[SimTask]) -> bool:
    return all(task.done() for task in tasks)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


class SimClock:
    """One machine's clock: the loop's time, and how far the machine's wall clock is off."""

    def __init__(self, loop: SimLoop, skew_s: float = 0.0) -> None:
        self._loop = loop
        self.skew_s = skew_s

    def now_ns(self) -> int:
        return EPOCH_NS + round((self._loop.now_s + self.skew_s) * SECOND_NS)

    def monotonic_s(self) -> float:
        return self._loop.now_s
