"""Clients at work on a cluster through all of its managers at once, and what they were told.

Each manager has its own clients, over its unix socket, so that no network fault reaches them:

- `registers` make, change, read and remove a few services without tasks whose label `value` differs
  with every write: the history for tests.e2e.history;
- `keeper` makes configs that nobody removes;
- `scaler` scales, relabels and rolls services whose tasks note their beats.

They run on a thread of their own beside the test, which takes the cluster apart meanwhile. An error
that a manager gave back means that nothing was done, but for `TimedOut` and `Internal`; after any
other (the connection broke, no answer came in time) nobody knows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType

import grpc
import msgspec

from swarm import errors
from swarm.rpc import ERROR_KEY, Channel
from swarm.v1 import (
    ConfigSpec,
    ContainerSpec,
    CreateRequest,
    GetRequest,
    Kind,
    ListRequest,
    Mount,
    RemoveRequest,
    Replicated,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
    Spec,
    TaskSpec,
    UpdateConfig,
    UpdateRequest,
)
from swarm.v1.services import ControlClient
from tests.e2e.cluster import wait_for
from tests.e2e.history import (
    ENV,
    SCRIPT,
    Answer,
    check_kept,
    check_registers,
    check_revisions,
    version_of,
)
from tests.linearizability import Action, Operation, Outcome

REGISTERS = 4  # services without tasks, which all register clients share
REGISTER_CLIENTS = 2  # of each manager
RUNNING = ("run1", "run2")  # services with tasks
REPLICAS = (2, 3, 4)
PAUSE_S = 0.08  # of a client between two calls, twice that at most
SCALE_PAUSE_S = 1.0  # of a scaler
KEEP_PAUSE_S = 0.3
REFUSED_SHOWN = 100  # in a failure's text
CALL_S = 5.0  # how long a client waits for an answer


def beating(name: str, replicas: int, beats: Path, *, value: int = 0) -> ServiceSpec:
    """A service whose tasks note their beats."""
    return ServiceSpec(
        name=name,
        labels={"value": str(value)},
        mode=ServiceMode(replicated=Replicated(replicas=replicas)),
        update=UpdateConfig(parallelism=1, monitor_ns=0, failure_action="continue"),
        task=TaskSpec(
            runtime="process",
            restart=RestartPolicy(delay_ns=200_000_000),
            container=ContainerSpec(
                command=("sh", "-c", SCRIPT),
                env=ENV,
                mounts=(Mount(type="bind", source=str(beats), target="/beats"),),
                stop_grace_period_ns=3_000_000_000,
            ),
        ),
    )


def idle(name: str, value: int) -> ServiceSpec:
    """A service without tasks."""
    return ServiceSpec(
        name=name,
        labels={"value": str(value)},
        mode=ServiceMode(replicated=Replicated(replicas=0)),
        task=TaskSpec(runtime="process", container=ContainerSpec(command=("sleep", "1"))),
    )


def told(error: errors.SwarmError) -> Outcome:
    """What an error means for the write that it answers."""
    cause = error.__context__
    if not isinstance(cause, grpc.aio.AioRpcError):
        return Outcome.UNKNOWN
    made_there = any(key == ERROR_KEY for key, _ in cause.trailing_metadata() or ())
    if not made_there or isinstance(error, errors.TimedOut | errors.Internal):
        return Outcome.UNKNOWN
    return Outcome.FAILED


class Load:
    """Clients of the managers at these sockets, by the managers' names. A context: they work inside
    it. Times are those of the machine's monotonic clock.
    """

    def __init__(self, sockets: Mapping[str, Path], beats: Path, *, seed: int = 1) -> None:
        self.history: list[Operation] = []
        self.kept: list[Operation] = []
        self.answers: list[Answer] = []
        self.refusals: Counter[str] = Counter()  # what clients were refused with, for people
        self.failed: list[tuple[Operation, str]] = []  # as called, and what was said
        self._sockets = dict(sockets)
        self._beats = beats
        self.seed = seed
        self._values = itertools.count(1)
        self._over = asyncio.Event()  # of the thread's loop, which alone touches it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    # -------------------------------------------------------------- life

    def __enter__(self) -> Load:
        self._thread = threading.Thread(target=self._work, name="load")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._thread is not None
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(4 * CALL_S)
        if kind is None:
            assert not self._thread.is_alive(), "clients do not end"
            if self._error is not None:
                raise self._error

    def _work(self) -> None:
        try:
            asyncio.run(self._clients())
        except BaseException as error:  # for the test's own thread
            self._error = error

    async def _clients(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            for number, (name, path) in enumerate(sorted(self._sockets.items())):
                channel = Channel.unix(str(path))
                stack.push_async_callback(channel.close)
                control = ControlClient(channel)
                for i in range(REGISTER_CLIENTS):
                    client = _Client(self, f"{name}.{i}", control, 100 * number + i)
                    group.create_task(client.repeat(client.register, PAUSE_S))
                keeper = _Client(self, f"{name}.k", control, 100 * number + 50)
                group.create_task(keeper.repeat(keeper.keep, KEEP_PAUSE_S))
                scaler = _Client(self, f"{name}.s", control, 100 * number + 60)
                group.create_task(scaler.repeat(scaler.scale, SCALE_PAUSE_S))

    # -------------------------------------------------------------- for the test

    def progress(self, names: Iterable[str] = (), *, timeout_s: float = 30.0) -> float:
        """Waits until clients of each of these managers (all) got a write through that they began
        from now on; seconds until the last of them had.
        """
        wanted = set(names) or set(self._sockets)
        since = time.monotonic()
        start = len(self.history)

        def missing() -> set[str]:
            self._check()
            return wanted - {
                op.client.partition(".")[0]
                for op in self.history[start:]
                if op.outcome is Outcome.OK and op.action is Action.PUT and op.invoked >= since
            }

        try:
            wait_for(
                f"a write through each of {', '.join(sorted(wanted))}",
                lambda: not missing(),
                timeout_s=timeout_s,
                every_s=0.02,
            )
        except AssertionError as error:
            raise AssertionError(
                f"{error}; none through {missing()}; refused so far: {dict(self.refusals)}"
            ) from None
        return time.monotonic() - since

    def work(self, seconds: float, names: Iterable[str] = ()) -> None:
        """Lets time pass while clients work, then waits for the progress of these."""
        until = time.monotonic() + seconds
        wait_for("time has passed", lambda: time.monotonic() >= until, timeout_s=seconds + 5)
        self.progress(names)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def judge(self) -> None:
        """After the end: whether all that clients were told was right."""
        present = asyncio.run(self._present())
        problems = [
            *check_registers(self.history),
            *check_revisions(self.answers),
            *check_kept(self.kept, present),
        ]
        if problems:
            keys = {problem.partition(":")[0] for problem in problems}
            refused = [f"  {op.key} {op}: {why}" for op, why in self.failed if op.key in keys]
            told = [
                *problems[:5],
                "of calls that had no effect it was said:",
                *refused[-REFUSED_SHOWN:],
            ]
            raise AssertionError(f"seed {self.seed}:\n" + "\n".join(told))

    async def _present(self) -> set[str]:
        """Reads everything once more through every manager, as part of the history; the names of
        the configs, which all managers know alike.
        """
        seen: list[set[str]] = []
        async with AsyncExitStack() as stack:
            for name, path in sorted(self._sockets.items()):
                channel = Channel.unix(str(path))
                stack.push_async_callback(channel.close)
                client = _Client(self, f"{name}.end", ControlClient(channel), 0)
                await client.read_all()
                seen.append(await client.configs())
        assert all(s == seen[0] for s in seen), "managers differ in what they know"
        return seen[0]

    def summary(self) -> str:
        """What happened, in one line."""
        count = Counter(op.outcome.value for op in self.history)
        slowest = max((op.returned - op.invoked for op in self.history), default=0.0)
        return (
            f"{len(self.history)} operations ({dict(count)}; slowest {slowest:.1f} s), "
            f"{len(self.kept)} kept, refused: {dict(self.refusals)}"
        )

    # -------------------------------------------------------------- for the clients

    @property
    def over(self) -> asyncio.Event:
        return self._over

    @property
    def beats(self) -> Path:
        return self._beats

    def new_value(self) -> int:
        return next(self._values)

    def rng(self, number: int) -> random.Random:
        return random.Random(1000 * self.seed + number)


class _Client:
    """One of them; one call at a time."""

    def __init__(self, load: Load, name: str, control: ControlClient, number: int) -> None:
        self._load = load
        self._name = name
        self._control = control
        self._rng = load.rng(number)

    async def repeat(self, step: Callable[[], Awaitable[None]], pause_s: float) -> None:
        while not self._load.over.is_set():
            try:
                await step()
            except errors.SwarmError as error:
                self._load.refusals[type(error).__name__] += 1
            await asyncio.sleep(self._rng.random() * 2 * pause_s)

    # -------------------------------------------------------------- registers

    async def register(self) -> None:
        key = f"reg{self._rng.randrange(REGISTERS)}"
        what = self._rng.choices(("list", "put", "remove"), (2, 6, 1))[0]
        if what == "list":
            await self.read_all()
            return
        # Also before a removal: one that nobody heard of would explain the loss of any write.
        known = await self._read(key)
        if what == "remove":
            await self._write(
                Operation(self._name, key, Action.DELETE, time.monotonic(), 0.0),
                lambda: self._remove(key),
            )
            return
        value = self._load.new_value()
        op = Operation(
            *(self._name, key, Action.PUT, time.monotonic(), 0.0),
            value=value,
            expected=version_of(_value(known)) if known is not None else 0,
        )
        await self._write(op, lambda: self._put(key, value, known))

    async def _read(self, key: str) -> Service | None:
        invoked = time.monotonic()
        service: Service | None = None
        try:
            request = GetRequest(kind=Kind.SERVICE, ref=key)
            answer = await self._control.get(request, timeout_s=CALL_S)
            service = answer.object.service if answer.object is not None else None
        except errors.NotFound:
            pass
        service = _there(service)
        self._note_read(key, service, invoked, time.monotonic())
        return service

    async def read_all(self) -> None:
        """All registers at once: one view of everything."""
        invoked = time.monotonic()
        answer = await self._control.list(ListRequest(kind=Kind.SERVICE), timeout_s=CALL_S)
        returned = time.monotonic()
        found: dict[str, Service | None] = {f"reg{i}": None for i in range(REGISTERS)}
        for o in answer.objects:
            if o.service is not None and o.service.spec and o.service.spec.name in found:
                found[o.service.spec.name] = _there(o.service)
        for key, service in found.items():
            self._note_read(key, service, invoked, returned)
        self._load.answers.append(
            Answer(self._name, invoked, returned, answer.revision, wrote=False)
        )

    def _note_read(
        self, key: str, service: Service | None, invoked: float, returned: float
    ) -> None:
        value = _value(service) if service is not None else None
        self._load.history.append(
            Operation(
                *(self._name, key, Action.READ, invoked, returned, Outcome.OK, value),
                version=version_of(value) if value is not None else 0,
            )
        )

    async def _put(self, key: str, value: int, known: Service | None) -> int:
        spec = Spec(service=idle(key, value))
        if known is None:
            made = await self._control.create(CreateRequest(spec=spec), timeout_s=CALL_S)
            return made.version
        assert known.meta is not None
        request = UpdateRequest(
            kind=Kind.SERVICE, id=known.id, version=known.meta.version, spec=spec
        )
        return (await self._control.update(request, timeout_s=CALL_S)).version

    async def _remove(self, key: str) -> int:
        await self._control.remove(RemoveRequest(kind=Kind.SERVICE, ref=key), timeout_s=CALL_S)
        return 0

    async def _write(self, op: Operation, call: Callable[[], Awaitable[int]]) -> None:
        """Does it and notes what came of it."""
        outcome, revision = Outcome.OK, 0
        try:
            revision = await call()
        except errors.NotFound as error:
            # That there is nothing to remove is as good as having read it; a change of what was
            # removed meanwhile is refused.
            self._load.failed.append((op, f"NotFound: {error.message}"))
            outcome = Outcome.REFUSED if op.action is Action.PUT else Outcome.OK
            if op.action is Action.DELETE:
                op = dataclasses.replace(op, action=Action.READ)
        except errors.SwarmError as error:
            outcome = told(error)
            # Only this refusal tells of the state; others may come of a write that is under way.
            if op.expected == 0 and "exists already" in error.message:
                outcome = Outcome.REFUSED
            self._load.refusals[type(error).__name__] += 1
            if outcome is Outcome.FAILED:
                self._load.failed.append((op, f"{type(error).__name__}: {error.message}"))
        returned = time.monotonic()
        written = op.action is Action.PUT and outcome is Outcome.OK
        if written and revision:
            self._load.answers.append(
                Answer(self._name, op.invoked, returned, revision, wrote=True)
            )
        version = version_of(op.value) if written and isinstance(op.value, int) else 0
        self._load.history.append(
            dataclasses.replace(op, returned=returned, outcome=outcome, version=version)
        )

    # -------------------------------------------------------------- what stays

    async def keep(self) -> None:
        value = self._load.new_value()
        name = f"kept{self._load.seed}-{value}"
        invoked = time.monotonic()
        outcome = Outcome.OK
        try:
            spec = Spec(config=ConfigSpec(name=name, data=b"x"))
            answer = await self._control.create(CreateRequest(spec=spec), timeout_s=CALL_S)
        except errors.SwarmError as error:
            outcome = told(error)
            self._load.refusals[type(error).__name__] += 1
        else:
            self._load.answers.append(
                Answer(self._name, invoked, time.monotonic(), answer.version, wrote=True)
            )
        self._load.kept.append(
            Operation(self._name, name, Action.PUT, invoked, time.monotonic(), outcome, value)
        )

    async def configs(self) -> set[str]:
        answer = await self._control.list(ListRequest(kind=Kind.CONFIG), timeout_s=CALL_S)
        return {o.config.spec.name for o in answer.objects if o.config and o.config.spec}

    # -------------------------------------------------------------- what runs

    async def scale(self) -> None:
        """One change of a service with tasks; whoever is slower than another loses."""
        name = self._rng.choice(RUNNING)
        try:
            request = GetRequest(kind=Kind.SERVICE, ref=name)
            found = (await self._control.get(request, timeout_s=CALL_S)).object
        except errors.NotFound:
            spec = Spec(service=beating(name, REPLICAS[0], self._load.beats))
            await self._control.create(CreateRequest(spec=spec), timeout_s=CALL_S)
            return
        assert found is not None and found.service is not None
        service, spec_now = found.service, found.service.spec
        assert service.meta is not None and spec_now is not None and spec_now.task is not None
        match self._rng.choices(("scale", "label", "roll"), (4, 3, 1))[0]:
            case "scale":
                replicas = self._rng.choice(REPLICAS)
                changed = msgspec.structs.replace(
                    spec_now, mode=ServiceMode(replicated=Replicated(replicas=replicas))
                )
            case "label":
                changed = msgspec.structs.replace(
                    spec_now, labels={"value": str(self._load.new_value())}
                )
            case _:
                task = msgspec.structs.replace(
                    spec_now.task, force_update=spec_now.task.force_update + 1
                )
                changed = msgspec.structs.replace(spec_now, task=task)
        await self._control.update(
            UpdateRequest(
                kind=Kind.SERVICE,
                id=service.id,
                version=service.meta.version,
                spec=Spec(service=changed),
            ),
            timeout_s=CALL_S,
        )


def _there(service: Service | None) -> Service | None:
    """None for one whose removal was acknowledged and whose leader has not got to it yet."""
    return None if service is None or service.pending_delete else service


def _value(service: Service) -> int:
    return int(service.spec.labels["value"]) if service.spec is not None else 0
