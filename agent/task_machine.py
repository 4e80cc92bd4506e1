"""How one task gets from assigned to ended and forgotten, as a pure function: `step(machine, event)
-> (machine, effects)`.

Owns every decision about one task; performs nothing. The worker feeds in what happened (an
assignment, an operation's result, a runtime's event, what was found on the host after a restart)
and carries out the effects. Invariants: reported states only grow along swarm.states.LEGAL; at most
one operation of the runtime is under way; nothing is started twice; a task is forgotten only when
the runtime holds nothing of it any more.

The states are those of SwarmKit's agent/exec package. One difference: the operations are events
here, not a blocking controller, so that a stop reaches a task in the middle of its preparation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import assert_never

from msgspec import structs

from agent.runtime.base import UNHEALTHY, Found, Phase, Started
from agent.runtime.base import Event as RuntimeEvent
from swarm import errors
from swarm.states import ended, may_follow
from swarm.v1 import ContainerStatus, TaskState, TaskStatus

S = TaskState


class Doing(Enum):
    """The operation of the runtime that is under way."""

    NOTHING = "nothing"
    PREPARE = "prepare"
    START = "start"
    STOP = "stop"
    CLEAN = "clean"  # remove what an interrupted preparation left, then prepare again
    REMOVE = "remove"


class Have(Enum):
    """What the runtime has of the task."""

    NOTHING = "nothing"
    PARTS = "parts"  # a preparation that did not finish
    PREPARED = "prepared"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class Exit:
    """How the task's main process ended by itself."""

    code: int
    message: str = ""
    cause: str = ""  # as in TaskStatus
    # Somebody else, or the engine's own end, made it end: code 0 is no success.
    forced: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """All that is known of one task on this node."""

    status: TaskStatus
    desired: TaskState
    # Secrets, configs and networks are at hand; after a restart they come with the next session.
    equipped: bool = False
    # The host was looked at since the agent started; before, nothing is done.
    located: bool = False
    have: Have = Have.NOTHING
    doing: Doing = Doing.NOTHING
    started: Started | None = None
    exit: Exit | None = None
    # The healthcheck passed before the answer to the start came.
    healthy: bool = False
    # Why the task cannot stay although something of it may still run.
    failure: Refused | None = None
    forgotten: bool = False

    @property
    def state(self) -> TaskState:
        return self.status.state

    def check_invariants(self) -> None:
        """For tests, after every step."""
        errors.invariant(not (self.forgotten and self.doing != Doing.NOTHING), "busy and forgotten")
        errors.invariant(
            not (self.forgotten and self.have != Have.NOTHING), "forgotten with leftovers"
        )
        errors.invariant(
            not ended(self.state) or self.have != Have.RUNNING or self.doing == Doing.STOP,
            "ended and left running",
        )
        errors.invariant(self.located or self.doing == Doing.NOTHING, "acts before it has looked")


# ------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class Assigned:
    """A manager wants this; `equipped` as in Machine."""

    desired: TaskState
    equipped: bool


@dataclass(frozen=True, slots=True)
class Located:
    """The host was looked at; None: it holds nothing of the task."""

    found: Found | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """The preparation is done."""


@dataclass(frozen=True, slots=True)
class DidStart:
    """The task runs."""

    started: Started


@dataclass(frozen=True, slots=True)
class Refused:
    """A preparation or a start did not work, or was abandoned."""

    message: str
    rejected: bool  # the task can never run here
    cause: str = ""  # as in TaskStatus


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The runtime went away during a preparation or a start: nobody knows what became of it before
    the host was looked at again.
    """


@dataclass(frozen=True, slots=True)
class DidStop:
    """Nothing runs any more; the exit code where there is one."""

    code: int | None


@dataclass(frozen=True, slots=True)
class DidRemove:
    """The runtime holds nothing of the task any more."""


@dataclass(frozen=True, slots=True)
class Healthy:
    """The healthcheck passed."""


@dataclass(frozen=True, slots=True)
class Unhealthy:
    """The healthcheck failed as often as it may."""

    message: str


@dataclass(frozen=True, slots=True)
class Exited:
    """The main process ended by itself."""

    exit: Exit


Event = (
    Assigned
    | Located
    | Prepared
    | DidStart
    | Refused
    | Interrupted
    | DidStop
    | DidRemove
    | Healthy
    | Unhealthy
    | Exited
)

# ------------------------------------------------------------------ effects


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the manager, and the disk, the machine's status."""


@dataclass(frozen=True, slots=True)
class Run:
    """Begin an operation; its result comes back as an event."""

    doing: Doing


@dataclass(frozen=True, slots=True)
class Abandon:
    """End the preparation or start that is under way soon; its result still comes as an event."""


@dataclass(frozen=True, slots=True)
class Expose:
    """The task takes connections from now on."""

    started: Started


@dataclass(frozen=True, slots=True)
class Hide:
    """The task takes no connections any more."""


@dataclass(frozen=True, slots=True)
class Forget:
    """Nothing is left: report it removed and drop its record."""


Effect = Report | Run | Abandon | Expose | Hide | Forget


# ------------------------------------------------------------------ the step


def begin(status: TaskStatus, desired: TaskState, *, equipped: bool) -> Machine:
    """A machine for a task that was just assigned, or read back from the disk."""
    return Machine(status=status, desired=desired, equipped=equipped)


def step(machine: Machine, event: Event, *, now_ns: int) -> tuple[Machine, list[Effect]]:
    """What follows from an event. An event that no longer matters changes nothing."""
    if machine.forgotten or not _awaited(machine.doing, event):
        return machine, []
    effects: list[Effect] = []
    m = _learn(machine, event)
    m = _conclude(m, event, effects, now_ns)
    m = _act(m, effects, now_ns)
    before = machine.status
    if m.status != before:
        errors.invariant(
            may_follow(before.state, m.state), f"{before.state.name} before {m.state.name}"
        )
        effects.insert(0, Report())
    return m, effects


def _awaited(doing: Doing, event: Event) -> bool:
    """Whether a result is that of the operation under way; all other events may always come."""
    match event:
        case Prepared():
            return doing == Doing.PREPARE
        case DidStart():
            return doing == Doing.START
        case Refused() | Interrupted():
            return doing in (Doing.PREPARE, Doing.START)
        case DidStop():
            return doing == Doing.STOP
        case DidRemove():
            return doing in (Doing.CLEAN, Doing.REMOVE)
        case _:
            return True


def _learn(m: Machine, event: Event) -> Machine:
    """Takes the event's facts in; reports nothing yet."""
    match event:
        case Assigned(desired, equipped):
            # Desired states only grow; an older manager's word does not bring a task back.
            return replace(m, desired=max(m.desired, desired), equipped=m.equipped or equipped)
        case Located(found):
            return m if m.located else _locate(replace(m, located=True), found)
        case Prepared():
            return replace(m, doing=Doing.NOTHING, have=Have.PREPARED)
        case DidStart(started):
            have = Have.EXITED if m.exit else Have.RUNNING
            started = replace(started, healthy=started.healthy or m.healthy)
            return replace(m, doing=Doing.NOTHING, have=have, started=started)
        case Refused():
            # What an operation that failed has left behind is unknown; a stop finds out.
            have = Have.RUNNING if m.doing == Doing.START else Have.PARTS
            return replace(m, doing=Doing.NOTHING, have=have)
        case Interrupted():
            # As after a restart of the agent; what is found decides how it goes on.
            return replace(
                m,
                doing=Doing.NOTHING,
                located=False,
                have=Have.NOTHING,
                exit=None,
                healthy=False,
            )
        case DidStop(code):
            if m.exit is None and code is not None:
                m = replace(m, exit=Exit(code))
            have = Have.EXITED if m.have == Have.RUNNING else m.have
            return replace(m, doing=Doing.NOTHING, have=have)
        case DidRemove():
            return replace(m, doing=Doing.NOTHING, have=Have.NOTHING, started=None)
        case Exited(exit_):
            if m.doing == Doing.START:  # it was faster than the answer to its start
                return replace(m, exit=exit_)
            if m.have != Have.RUNNING or m.doing == Doing.STOP:
                return m
            return replace(m, exit=exit_, have=Have.EXITED)
        case Healthy():
            if not _alive(m):
                return m
            if m.started is not None:
                m = replace(m, started=replace(m.started, healthy=True))
            return replace(m, healthy=True)
        case Unhealthy(message):
            if not _alive(m):
                return m
            said = f"unhealthy: {message}" if message else "unhealthy"
            return replace(m, failure=Refused(said, rejected=False, cause=UNHEALTHY))
        case _:
            assert_never(event)


def _alive(m: Machine) -> bool:
    """Whether what its healthcheck says matters."""
    return m.doing == Doing.START or (m.have == Have.RUNNING and m.doing != Doing.STOP)


def _locate(m: Machine, found: Found | None) -> Machine:
    if found is None:
        return m
    match found.phase:
        case Phase.CREATED:
            # Before READY nobody knows whether the preparation was finished.
            whole = m.state >= S.READY
            return replace(m, have=Have.PREPARED if whole else Have.PARTS)
        case Phase.RUNNING:
            return replace(m, have=Have.RUNNING, started=found.started)
        case Phase.EXITED:
            return replace(m, have=Have.EXITED, exit=exit_of(found))
        case _:
            assert_never(found.phase)


def exit_of(found: Found | RuntimeEvent) -> Exit:
    """How a task has ended that the runtime tells of."""
    return Exit(found.exit_code, found.message, found.cause, found.forced)


def _conclude(m: Machine, event: Event, effects: list[Effect], now_ns: int) -> Machine:
    """The state that the facts amount to."""
    if ended(m.state):
        return m
    match event:
        case Located(found) if _lost(m, found):
            if m.desired >= S.SHUTDOWN:
                return _set(m, S.SHUTDOWN, now_ns, "shutdown")
            return _set(
                m,
                S.FAILED,
                now_ns,
                "failed",
                err="the task is gone: it was removed from the node while the agent or its engine "
                "was away",
            )
        case Refused() if m.desired < S.SHUTDOWN:
            if m.have == Have.RUNNING:  # perhaps: it has to be stopped before it has failed
                return replace(m, failure=event)
            return _fail(m, event, now_ns, m.status.container)
        case DidStop():
            effects.append(Hide())
            return _stopped(m, now_ns)
        case Unhealthy() if m.state == S.RUNNING and m.failure is not None:
            # Told before it is stopped, for no node may send it connections from now on.
            return replace(
                m,
                status=structs.replace(
                    m.status, message="being stopped", err=m.failure.message, cause=UNHEALTHY
                ),
            )
        case _:
            pass
    if m.doing != Doing.NOTHING:
        return m
    if m.have == Have.EXITED and m.exit is not None:
        effects.append(Hide())
        return _exited(m, m.exit, now_ns)
    if m.have == Have.RUNNING and m.started is not None and m.failure is None:
        if m.started.healthy and isinstance(event, DidStart | Healthy | Located):
            effects.append(Expose(m.started))
        return _running(m, m.started, now_ns)
    return m


def _lost(m: Machine, found: Found | None) -> bool:
    """Whether a task that had been started is not there any more."""
    if found is None:
        return m.state >= S.STARTING
    return found.phase == Phase.CREATED and m.state >= S.RUNNING


def _running(m: Machine, started: Started, now_ns: int) -> Machine:
    state = S.RUNNING if started.healthy else S.STARTING
    container = started.container
    if m.state > state or (m.state == state and m.status.container == container):
        return m
    message = "started" if started.healthy else "waiting for the healthcheck"
    if started.note:
        message += f"; {started.note}"
    return _set(m, state, now_ns, message, container=container)


def _exited(m: Machine, exit_: Exit, now_ns: int) -> Machine:
    container = _container(m, exit_.code)
    if m.desired >= S.SHUTDOWN:  # the answer to its stop was lost with an earlier agent
        return _set(m, S.SHUTDOWN, now_ns, "shutdown", container=container)
    if exit_.code == 0 and not exit_.forced:
        return _set(m, S.COMPLETE, now_ns, "finished", container=container)
    said = [f"task: non-zero exit ({exit_.code})"] if exit_.code else []
    err = ": ".join([*said, exit_.message] if exit_.message else said)
    m = _set(m, S.FAILED, now_ns, "failed", err=err, container=container)
    return _because(m, exit_.cause)


def _stopped(m: Machine, now_ns: int) -> Machine:
    container = _container(m, m.exit.code if m.exit else None)
    if m.failure is not None:
        return _fail(m, m.failure, now_ns, container)
    return _set(m, S.SHUTDOWN, now_ns, "shutdown", container=container)


def _fail(m: Machine, why: Refused, now_ns: int, container: ContainerStatus | None) -> Machine:
    state = S.REJECTED if why.rejected and m.state < S.RUNNING else S.FAILED
    m = _set(m, state, now_ns, state.name.lower(), err=why.message, container=container)
    return _because(m, why.cause)


def _because(m: Machine, cause: str) -> Machine:
    return replace(m, status=structs.replace(m.status, cause=cause)) if cause else m


def _act(m: Machine, effects: list[Effect], now_ns: int) -> Machine:
    """What to do next."""
    if not m.located:
        return m
    if m.doing in (Doing.PREPARE, Doing.START):
        if m.desired >= S.SHUTDOWN:
            effects.append(Abandon())
        return m
    if m.doing != Doing.NOTHING:
        return m
    over = ended(m.state) or m.desired >= S.SHUTDOWN or m.failure is not None
    if m.have == Have.RUNNING and over:
        effects.append(Hide())
        return _run(m, Doing.STOP, effects)
    if over and not ended(m.state):
        m = _set(m, S.SHUTDOWN, now_ns, "shutdown", container=m.status.container)
    if m.desired == S.REMOVE:
        if m.have != Have.NOTHING:
            return _run(m, Doing.REMOVE, effects)
        effects.append(Forget())
        return replace(m, forgotten=True)
    if over:
        return m
    return _advance(m, effects, now_ns)


def _advance(m: Machine, effects: list[Effect], now_ns: int) -> Machine:
    """Towards running."""
    if m.state < S.ACCEPTED:
        m = _set(m, S.ACCEPTED, now_ns, "accepted")
    match m.have:
        case Have.PARTS:
            return _run(m, Doing.CLEAN, effects)
        case Have.NOTHING:
            if not m.equipped:
                return m
            if m.state < S.PREPARING:
                m = _set(m, S.PREPARING, now_ns, "preparing")
            return _run(m, Doing.PREPARE, effects)
        case Have.PREPARED:
            if m.state < S.READY:
                m = _set(m, S.READY, now_ns, "prepared")
            if m.desired < S.RUNNING or not m.equipped:
                return m
            if m.state < S.STARTING:
                m = _set(m, S.STARTING, now_ns, "starting")
            return _run(m, Doing.START, effects)
        case Have.RUNNING | Have.EXITED:
            return m
        case _:
            assert_never(m.have)


def _run(m: Machine, doing: Doing, effects: list[Effect]) -> Machine:
    effects.append(Run(doing))
    return replace(m, doing=doing)


def _set(
    m: Machine,
    state: TaskState,
    now_ns: int,
    message: str,
    *,
    err: str = "",
    container: ContainerStatus | None = None,
) -> Machine:
    if not may_follow(m.state, state):
        return m
    ports = m.started.host_ports if m.started is not None else m.status.ports
    status = TaskStatus(
        state=state,
        timestamp_ns=now_ns,
        message=message,
        err=err,
        container=container or m.status.container,
        ports=ports,
    )
    return replace(m, status=status)


def _container(m: Machine, code: int | None) -> ContainerStatus | None:
    """The container as it was, with its exit code and without a process."""
    known = (m.started.container if m.started else None) or m.status.container
    if known is None and code is None:
        return None
    return ContainerStatus(container_id=known.container_id if known else "", exit_code=code)
