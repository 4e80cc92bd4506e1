"""When a service is stuck: what the cluster does by itself will not bring it further, and why.

Worked out from the objects alone, and careful: as long as something may come by itself (a node that
is down comes back, one that has just joined is heard, others make room, the next attempt is not
known to fail) a service is not stuck, and waits for whoever waits to lose patience. The causes,
most telling first:

- its update was paused by a failure (one that waits for a person, as asked, is not stuck);
- an image that no registry has, or that needs other credentials; something that none of the nodes
  open to it can do;
- a crash loop: the last CRASHES tasks of a slot ended by themselves before they had run well for a
  while (backoff.py), and the next one, if it runs, is still watched;
- tasks that ended and are not to be restarted: the restart policy, or its attempts, are used up;
- replicas that would not all fit even if nothing else ran and every node were ready;
- a gate (depends_on) on a service that does not exist or is stuck itself.

A service that was rolled back is not stuck: it is at rest, and its update_status says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from manager.control.backoff import GROWS_FROM, crashes_after, healthcheck
from manager.control.gates import Closed, Gates, stays_ended, words
from manager.control.slots import Slot, is_live, is_unplaced, slot_of, slot_order
from manager.control.template import (
    PAUSED,
    UPDATING,
    Mode,
    Templates,
    mode_of,
    monitor_ns,
    restart_policy,
    state_of,
    update_config,
)
from manager.scheduler import (
    FOR_EVER,
    barred,
    ceiling,
    refused,
    requirement_of,
    said,
    unseen,
)
from manager.store import View
from swarm import states
from swarm.clock import SECOND_NS
from swarm.quantities import format_duration
from swarm.v1 import Node, Service, Task, TaskState

CRASHES = GROWS_FROM  # in a row are a loop
BACKS_OFF_FROM = 2  # crashes in a row: from then on a task that waits for its start is said to
IMAGE_CAUSES = frozenset({"image_missing", "image_denied"})
NODE_CAUSES = frozenset({"unsupported", "program_missing"})
BY_ITSELF = frozenset({TaskState.COMPLETE, TaskState.FAILED, TaskState.REJECTED})
BE = "{be}"  # stands for is or are, where a sentence is on one task or several
_EXIT = "task: non-zero exit ("


@dataclass(frozen=True, slots=True)
class Facts:
    """What `service_status` has found out already."""

    view: View
    service: Service
    now_ns: int
    mode: Mode
    templates: Templates
    # Tasks that are not to be forgotten, oldest first; of jobs those of the present iteration.
    slots: Mapping[Slot, list[Task]]
    desired: int
    gates: Gates
    # The closed gates that hold it back now.
    held: tuple[Closed, ...]
    # How many slots one stands for; not there: itself.
    counts: Mapping[Slot, int]
    _said: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        return "task" if self.mode.per_node or self.mode.job else "replica"

    def part(self, count: int) -> str:
        """ "2 of 3 replicas"."""
        return f"{count} of {self.desired} {self.unit}{'' if self.desired == 1 else 's'}"

    def clause(self, count: int, text: str) -> str:
        """A sentence on so many tasks; the text begins with its verb, or with BE."""
        if text.startswith(BE):
            text = ("is" if count == 1 else "are") + text.removeprefix(BE)
        return f"{self.part(count)} {text}"

    def why(self, ended: Task) -> str:
        """Why a task ended; of one that its node refused, what all nodes say that have done so."""
        if not refused(ended) or self.mode.per_node or self.view.count(Node) < 2:
            return failure(ended)
        if not self._said:
            tasks = (t for tasks in self.slots.values() for t in tasks)
            self._said.append(said(self.view, filter(self.templates.up_to_date, tasks)))
        return self._said[0] or failure(ended)

    def waiting(self, closed: Closed) -> str:
        """The sentence on a gate."""
        status = self.service.update_status
        rolling = status is not None and status.state in UPDATING
        subject = "the update" if rolling else "the service"
        return f"{subject} waits {words((closed,), progress=True)}"


@dataclass(frozen=True, slots=True)
class Trouble:
    """One reason why a service is stuck; the task whose log may say more."""

    reason: str
    task_id: str = ""


def troubles(facts: Facts, behind: Callable[[str], str | None]) -> list[Trouble]:
    """Why the service is stuck, most telling first; empty: it is not. `behind`: the end of a
    sentence on the service of that id, which is waited for: what it is stuck with; None: it is not.
    """
    if facts.service.pending_delete:
        return []
    found: list[Trouble] = []
    status = facts.service.update_status
    if status is not None and status.state in PAUSED and not status.awaits_resume:
        found.append(Trouble(status.message))
    found += _failures(facts)
    found += _places(facts)
    found += _gates(facts, behind)
    return found


# ------------------------------------------------------------------ tasks that end


def _failures(facts: Facts) -> list[Trouble]:
    """Slots that have failed for certain, those with the same story counted together."""
    stories: dict[tuple[int, str], list[_Story]] = {}
    for slot in sorted(facts.slots, key=slot_order):
        story = _story(facts, slot)
        if story is not None:
            stories.setdefault((story.rank, story.text), []).append(story)
    found = []
    for rank, text in sorted(stories, key=lambda s: (s[0], -len(stories[s]), s[1])):
        alike = stories[rank, text]
        newest = max((story.task for story in alike), key=_age)
        if waits := [story.wait_ns for story in alike if story.wait_ns]:
            text = f"{backs_off(min(waits))}: {text}"
        found.append(Trouble(facts.clause(len(alike), text), newest.id))
    return found


def backs_off(wait_ns: int) -> str:
    """The end of a sentence on a slot whose next attempt waits for so long."""
    seconds = -(-wait_ns // SECOND_NS)
    return f"{BE} backing off, next try in {format_duration(seconds * SECOND_NS)}"


def waits_ns(task: Task, now_ns: int) -> int:
    """How long the slot still waits because its attempts have crashed, by its next one, or by the
    last where there is no next one yet; 0: it does not. After a single crash that is the plain
    restart delay, and no news.
    """
    if states.ended(state_of(task)):
        crashes, waits = task.crashes + 1, states.wanted(task.desired_state)
    else:
        crashes, waits = task.crashes, task.desired_state == TaskState.READY
    return max(0, task.start_after_ns - now_ns) if waits and crashes >= BACKS_OFF_FROM else 0


@dataclass(frozen=True, slots=True)
class _Story:
    """What became of a slot that fails for certain: the end of a sentence, and its task. `wait_ns`:
    how long its next attempt waits, which the sentence does not say.
    """

    rank: int
    text: str
    task: Task
    wait_ns: int = 0


def _story(facts: Facts, slot: Slot) -> _Story | None:
    tasks = facts.slots[slot]
    live = [t for t in tasks if is_live(t)]
    if any(runs_well(facts, t) for t in live if facts.templates.up_to_date(t)):
        return None
    ended = _last_end(facts, tasks)
    if ended is None:
        return _row_alone(facts, live)
    why = facts.why(ended)
    runs = any(state_of(t) == TaskState.RUNNING for t in live)
    cause = ended.status.cause if ended.status else ""
    if _goes_on_elsewhere(facts, ended, live):
        return None
    if cause in IMAGE_CAUSES and not runs:
        return _Story(1, f"cannot run: {why}", ended)
    if cause in NODE_CAUSES and not runs and _tried_everywhere(facts, slot):
        return _Story(1, f"cannot run on any node: {why}", ended)
    if not live and not states.wanted(ended.desired_state):
        return _final(facts, slot, ended, why)
    crashes = _crashes(facts, ended, live)
    if crashes < CRASHES:
        return None
    if wait_ns := max(waits_ns(t, facts.now_ns) for t in (ended, *live)):
        return _Story(2, f"{why}, {crashes} times in a row", ended, wait_ns)
    return _Story(2, f"{BE} in a crash loop, {crashes} times in a row: {why}", ended)


def _goes_on_elsewhere(facts: Facts, ended: Task, live: list[Task]) -> bool:
    """Whether a node has refused the slot's last attempt, and another is being tried, or nobody has
    decided yet (elsewhere.py).
    """
    if not refused(ended) or facts.mode.per_node:
        return False
    if after := [t for t in live if _age(t) > _age(ended)]:
        return after[-1].crashes <= ended.crashes
    return states.wanted(ended.desired_state) and ended.start_after_ns <= facts.now_ns


def _row_alone(facts: Facts, live: list[Task]) -> _Story | None:
    """As _story, where the attempts before are not kept, or the last went for another reason."""
    for task in reversed(live):
        if task.crashes >= CRASHES and facts.templates.up_to_date(task):
            why = f"crashed {task.crashes} times in a row"
            if wait_ns := waits_ns(task, facts.now_ns):
                return _Story(2, why, task, wait_ns)
            return _Story(2, f"{BE} in a crash loop: {why}", task)
    return None


def _last_end(facts: Facts, tasks: list[Task]) -> Task | None:
    """The slot's last task before the one that is there now, if it was of the present template and
    ended by itself.
    """
    for task in sorted(tasks, key=_age, reverse=True):
        if not is_live(task):
            by_itself = state_of(task) in BY_ITSELF and facts.templates.up_to_date(task)
            return task if by_itself else None
    return None


def _crashes(facts: Facts, ended: Task, live: list[Task]) -> int:
    """How many attempts of the slot have crashed in a row: as the one that follows knows it, or as
    it will.
    """
    if state_of(ended) == TaskState.COMPLETE and stays_ended(facts.service):
        return 0
    for task in reversed(live):
        if _age(task) > _age(ended) and task.spec_version == ended.spec_version:
            return task.crashes
    return crashes_after(facts.service, ended, facts.now_ns)


def settles_ns(service: Service, task: Task, now_ns: int) -> int:
    """How long a task that runs is still watched.

    It has run since a manager took the report of it: meta.updated_at_ns. The control loop does not
    write tasks that run, except to stop them, and a later report of the node can only prolong the
    watch. The node's own timestamp is no use, for its clock may be wrong; managers' clocks may
    differ as well, but the time is never longer than the whole watch.
    """
    if mode_of(service.spec).job or healthcheck(service) is not None or task.meta is None:
        return 0
    watched_ns = monitor_ns(update_config(service))
    return min(watched_ns, max(0, task.meta.updated_at_ns + watched_ns - now_ns))


def runs_well(facts: Facts, task: Task) -> bool:
    """Whether the task runs and has been watched for long enough."""
    if state_of(task) != TaskState.RUNNING:
        return False
    return settles_ns(facts.service, task, facts.now_ns) == 0


def _tried_everywhere(facts: Facts, slot: Slot) -> bool:
    """Whether each node that is open to the slot has said that it cannot do it, and none is still
    to be heard.
    """
    said = {
        t.node_id
        for tasks in facts.slots.values()
        for t in tasks
        if t.status is not None
        and t.status.cause in NODE_CAUSES
        and states.ended(state_of(t))
        and facts.templates.up_to_date(t)
    }
    if facts.mode.per_node:
        return slot in said
    return all(
        n.id in said
        for n in facts.view.all(Node)
        if (unseen(n) and not n.revoked) or is_open(facts.view, facts.service, n.id)
    )


def _final(facts: Facts, slot: Slot, newest: Task, why: str) -> _Story | None:
    """A slot whose task ended and gets no successor: the loop has let it go for good. (One that it
    has not let go gets its next task when its delay is over.)
    """
    policy = restart_policy(facts.service.spec)
    if state_of(newest) == TaskState.COMPLETE and stays_ended(facts.service):
        return None
    if facts.mode.per_node and not is_open(facts.view, facts.service, slot):
        return None
    used_up = ""
    if policy.max_attempts and policy.condition != "none":
        plural = "" if policy.max_attempts == 1 else "s"
        used_up = f" after {policy.max_attempts} restart{plural}"
    return _Story(3, f"ended and will not be restarted{used_up}: {why}", newest)


def is_open(view: View, service: Service, slot: Slot) -> bool:
    """Whether a slot that is a node may have a task now."""
    node = view.get(Node, str(slot))
    return node is not None and barred(node, requirement_of(service.spec)) is None


# ------------------------------------------------------------------ places


def _places(facts: Facts) -> list[Trouble]:
    """Tasks that no node could take even if it were empty."""
    waiting = [
        t
        for tasks in facts.slots.values()
        for t in tasks
        if is_unplaced(t)
        and facts.templates.up_to_date(t)
        and not facts.gates.loose(t.spec_version)
    ]
    nodes = [n for n in facts.view.all(Node) if not n.revoked]
    if not waiting or not nodes:
        return []
    need = requirement_of(facts.service.spec)
    if facts.mode.per_node:
        pinned = (facts.view.get(Node, t.node_id) for t in waiting)
        never = sum(1 for n in pinned if n is not None and not ceiling((n,), need, enough=1))
        if never:
            return [Trouble(f"{facts.part(never)} can never be placed: {_unplaced(waiting)}")]
        return []
    # A job's tasks go in turns, so one place is enough for it.
    wanted = 1 if facts.mode.job else facts.desired
    most = ceiling(nodes, need, enough=wanted)
    if most >= wanted:
        return []
    if most:
        text = f"no more than {most} of {facts.desired} {facts.unit}s can ever be placed"
    else:
        count = sum(facts.counts.get(slot_of(t), 1) for t in waiting)
        text = f"{facts.part(count)} can never be placed"
    return [Trouble(f"{text}: {_unplaced(waiting)}")]


def _unplaced(waiting: Iterable[Task]) -> str:
    """What the scheduler has said about them; that it is for ever is said beside it."""
    said = (t.status.err.removesuffix(FOR_EVER) for t in waiting if t.status and t.status.err)
    return next(said, "no node could take them even if it were empty")


# ------------------------------------------------------------------ gates


def _gates(facts: Facts, behind: Callable[[str], str | None]) -> list[Trouble]:
    """Gates that never open: on a service that does not exist, or is stuck."""
    found = []
    for closed in facts.held:
        why = behind(closed.service_id) if closed.service_id else ""
        if why is not None:
            found.append(Trouble(f"{facts.waiting(closed)}{why}"))
    return found


# ------------------------------------------------------------------ words


def failure(task: Task) -> str:
    """Why a task ended, as people say it: "exited with code 3"."""
    status = task.status
    if status is None:
        return states.label(state_of(task))
    code = status.container.exit_code if status.container else None
    if status.err.startswith(_EXIT):
        number, _, more = status.err.removeprefix(_EXIT).partition(")")
        return f"exited with code {number}{more}"
    if status.err:
        return status.err
    if state_of(task) == TaskState.COMPLETE:
        return "exited with code 0"
    if code is not None:
        return f"exited with code {code}"
    return status.message or states.label(state_of(task))


def newest_failure(tasks: Iterable[Task]) -> Task | None:
    """The last of the tasks that failed."""
    failed = (t for t in tasks if state_of(t) in (TaskState.FAILED, TaskState.REJECTED))
    return max(failed, key=_age, default=None)


def _age(task: Task) -> tuple[int, str]:
    return (task.meta.created_at_ns if task.meta else 0, task.id)
