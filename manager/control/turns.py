"""Who is given a place, in which order, and at whose expense: one tick's groups, turn by turn.

    ranking (whose turn) > quota (how many) > place, keeping off what is held for others
                                            > preempt: stop victims, hold their places
                                            > else blocked; the first blocked job has a reservation

Gangs are placed whole or not at all: a gang's places are claimed in the table and given back when
they do not suffice, so none sits on a part of what it needs, and two gangs cannot wait for each
other's parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from msgspec import structs

from manager.control.admission import Admission
from manager.control.holds import Hold
from manager.control.job_book import runs_since_ns
from manager.control.slots import is_live, is_unplaced
from manager.control.template import job_size, state_of, stop_grace_ns
from manager.control.tick import Tick
from manager.scheduler import Group, NodeTable, place
from manager.scheduler.backfill import UNKNOWN_NS, Reservation, ghosts, soonest
from manager.scheduler.preemption import Choice, Facts, Search
from manager.scheduler.ranking import GroupKey, Ranking, Turn
from manager.scheduler.table import Claim
from manager.scheduler.trial import Trial
from manager.store import Draft
from swarm import states
from swarm.v1 import Service, StopCause, Task, TaskState

# Nodes that one tick asks for victims: some 0.2 s of work. Who is not reached is due at once.
ASKED_MAX = 2_000
# Needs for whose reservation one tick searches all nodes; other blocked jobs are left to the next.
SOUGHT_MAX = 20

Note = Callable[[Group, Sequence[Task], str], None]
"""Told of tasks that were not placed; with what holds them back, empty where it is the nodes."""


class Turns:
    """One tick's turns, over a draft."""

    def __init__(
        self, admission: Admission, table: NodeTable, draft: Draft, tick: Tick, note: Note
    ) -> None:
        self._a = admission
        self._table = table
        self._draft = draft
        self._now_ns = draft.now_ns
        self._tick = tick
        self._note = note
        self._asked = 0
        self._sound: Hold | None = None  # what the head has, once it was looked at in this round
        self._sought = 0
        # What was found to fit nowhere at any time, and for how many tasks.
        self._nowhere: set[tuple[object, ...]] = set()
        self._searches: dict[tuple[object, ...], Search] = {}

    def run(self, groups: Iterable[Group]) -> None:
        """Places what can be placed; `note` hears of the rest."""
        a = self._a
        left: dict[GroupKey, Group] = {}
        turns = []
        jobs = False
        for group in groups:
            turn = a.turn(group, self._draft, self._now_ns)
            left[turn.key] = group
            turns.append(turn)
            jobs = jobs or turn.terms.job
            a.due.discard(turn.key)
        self._forget_stale(left)
        if jobs:
            a.totals()
        ranking = Ranking(turns, a.ledger.share)
        while (turn_ := ranking.next()) is not None:
            group = left[turn_.key]
            if not turn_.terms.job:
                self._all(turn_, group)
            elif turn_.terms.gang:
                self._gang(turn_, group)
            else:
                rest = self._some(turn_, group, ranking)
                if rest is not None:
                    left[turn_.key] = rest
                    ranking.again(turn_)
        a.wake_held()

    def _forget_stale(self, groups: Collection[GroupKey]) -> None:
        """Of the services at hand, groups whose tasks were replaced by ones of another version."""
        for service_id in {key[0] for key in groups}:
            for key in sorted(self._a.known(service_id).difference(groups)):
                tasks = self._draft.by(Task, "service", service_id)
                if not any(
                    is_unplaced(t) and (t.spec_version, t.node_id) == key[1:] for t in tasks
                ):
                    self._a.forget(key)

    # -------------------------------------------------------------- services and jobs

    def _all(self, turn: Turn, group: Group) -> None:
        """All of a group's tasks, as far as they fit."""
        placed, waits = self._put(turn, group)
        self._settle(turn, _without(group, placed), waits)

    def _some(self, turn: Turn, group: Group, ranking: Ranking) -> Group | None:
        """As many of a job's tasks as are its queue's turn; what is left for a later turn."""
        a, queue = self._a, turn.terms.queue
        each = a.each(group.service_id, group.spec_version, self._draft)
        room = a.ledger.room(queue, each)
        allowed = len(group.tasks) if room is None else min(room, len(group.tasks))
        bound = ranking.at_most(turn, a.ledger.part(each, queue))
        count = allowed if bound is None else min(bound, allowed)
        now, later = group.tasks[:count], group.tasks[count:]
        if not now:
            self._hold_back(turn, group, a.ledger.short(queue, each), by_quota=True)
            return None
        placed, waits = self._put(turn, replace(group, tasks=now))
        if len(placed) == len(now):
            if not later:
                a.clear(turn.key)
                return None
            return replace(group, tasks=later)
        rest = _without(group, placed)
        self._settle(turn, rest, waits)
        return None

    def _gang(self, turn: Turn, group: Group) -> None:
        """All of the gang's tasks or none."""
        a, queue = self._a, turn.terms.queue
        waits = self._incomplete(group)
        if waits:
            self._hold_back(turn, group, waits)
            return
        each = a.each(group.service_id, group.spec_version, self._draft)
        short = a.ledger.short(queue, each, len(group.tasks))
        if short:
            self._hold_back(turn, group, short, by_quota=True)
            return
        placed, waits = self._put(turn, group)
        if len(placed) < len(group.tasks):
            given = {t.id: t for t in group.tasks}
            for task in placed:
                self._draft.put(given[task.id])
                self._table.sync_task(task.id, None, self._draft)
                a.enter(task.id, task.service_id, self._draft)
            self._tick.placed -= len(placed)
            self._settle(turn, group, waits)
        else:
            a.clear(turn.key)
            a.holds.drop(turn.key)

    def _incomplete(self, group: Group) -> str:
        """Why the gang cannot begin yet though there may be room; empty: it can."""
        service = self._draft.get(Service, group.service_id)
        if service is None:
            return ""
        total, _ = job_size(service.spec)
        mine = {t.id for t in group.tasks}
        done: set[int] = set()
        for task in self._draft.by(Task, "service", service.id):
            if task.id in mine or task.job_iteration != service.job_iteration:
                continue
            if state_of(task) == TaskState.COMPLETE:
                done.add(task.slot)
            elif is_live(task) and state_of(task) >= TaskState.ASSIGNED:
                return "others of its gang have yet to stop"
        short = total - len(done) - len(mine)
        return f"its gang has yet to be made whole: {short} of {total} missing" if short > 0 else ""

    # -------------------------------------------------------------- placing

    def _put(self, turn: Turn, group: Group) -> tuple[list[Task], str]:
        """Gives the group's tasks places where it may have them. Returns those placed, and what
        held the others back though there was room; empty: nothing did.
        """
        a = self._a
        placed: list[Task] = []
        own = a.holds.get(turn.key)
        if own is not None and not turn.terms.gang:
            for node_id in sorted(own.spots):
                wanted = own.spots[node_id].tasks
                here = replace(group, tasks=group.tasks[len(placed) :][:wanted], node_id=node_id)
                placed += self._place(turn, here)
        if len(placed) == len(group.tasks):
            return placed, ""
        if turn.terms.gang and not self._all_fit(group):
            return [], ""
        if turn.terms.job:
            self._reserve(turn)
        grace_ns = self._grace_ns(group.service_id)
        kept = a.holds.binding(turn, grace_ns, self._now_ns)
        placed += self._place(turn, replace(group, tasks=group.tasks[len(placed) :], without=kept))
        left = replace(group, tasks=group.tasks[len(placed) :])
        if not left.tasks or not kept or not self._any_room(left):
            return placed, ""
        waits = ""
        for node_id in sorted(kept):
            if group.node_id not in ("", node_id):
                continue
            here = replace(group, tasks=group.tasks[len(placed) :], node_id=node_id)
            beside, short = self._beside(turn, here)
            placed += beside
            if short and not waits:
                waits = self._words(turn, node_id)
        return placed, waits

    def _all_fit(self, group: Group) -> bool:
        """Whether all of the tasks would find places if none were kept for others."""
        with Trial(self._table, self._draft, self._now_ns) as trial:
            return len(trial.place(group)) == len(group.tasks)

    def _any_room(self, group: Group) -> bool:
        """Whether one of the tasks would find a place if none were kept for others."""
        with Trial(self._table, self._draft, self._now_ns) as trial:
            return bool(trial.place(replace(group, tasks=ghosts("any", group.tasks[0], 1))))

    def _place(self, turn: Turn, group: Group) -> list[Task]:
        if not group.tasks:
            return []
        placed = place(self._table, group, self._draft, self._now_ns).placed
        for task in placed:
            self._draft.put(task)
            if turn.terms.job:
                self._a.enter(task.id, task.service_id, self._draft)
            if not turn.terms.gang:
                self._a.holds.used(turn.key, task.node_id, 1)
        self._tick.touched.extend(t.id for t in placed)
        self._tick.placed += len(placed)
        return list(placed)

    def _beside(self, turn: Turn, group: Group) -> tuple[list[Task], bool]:
        """Tasks on a node that is kept for others, as far as these still fit; True: there would
        have been room for more.
        """
        a = self._a
        found = list(place(self._table, group, self._draft, self._now_ns).placed)
        fitted = len(found)
        while found and not a.holds.room_beside(
            self._table, self._draft, self._now_ns, group.node_id, turn
        ):
            self._table.sync_task(found.pop().id, None, self._draft)
        for task in found:
            self._draft.put(task)
            if turn.terms.job:
                a.enter(task.id, task.service_id, self._draft)
            if not turn.terms.gang:
                a.holds.used(turn.key, task.node_id, 1)
        self._tick.touched.extend(t.id for t in found)
        self._tick.placed += len(found)
        return found, fitted > len(found)

    def _words(self, turn: Turn, node_id: str) -> str:
        holders = [h for h in self._a.holds.on(node_id) if h.binds(turn)]
        what = holders[0].turn
        kind = "job" if what.terms.job else "service"
        name = self._table.nodes[node_id].name if node_id in self._table.nodes else node_id
        return f"node {name} is kept for {kind} {what.name} (priority {what.terms.priority})"

    # -------------------------------------------------------------- what found no place

    def _settle(self, turn: Turn, group: Group, waits: str) -> None:
        """Remembers what has become of a group whose `tasks` are left over; tries for their place
        at the expense of others.
        """
        a, key = self._a, turn.key
        a.clear(key)
        a.note(key)
        if not group.tasks:
            return
        tasks = group.tasks
        if turn.terms.job and not turn.terms.gang:
            each = a.each(group.service_id, group.spec_version, self._draft)
            room = a.ledger.room(turn.terms.queue, each)
            tasks = tasks if room is None else tasks[:room]
        if tasks and self._may_preempt(turn):
            self._preempt(turn, replace(group, tasks=tasks))
        if turn.terms.job and tasks:
            a.blocked[key] = (turn, group)
        if waits:
            a.held_back[key] = waits
            a.by_hold.add(key)
        own = a.holds.get(key)
        if own is not None and own.preempts:
            names = sorted(self._name(n) for n in own.spots)
            whom = "the task before it" if own.own else "tasks of lower priority"
            waits = f"waits for {whom} to stop on {', '.join(names[:3])}" + (
                " and others" if len(names) > 3 else ""
            )
            a.held_back[key] = waits
        self._note(group, group.tasks, waits)

    def _hold_back(self, turn: Turn, group: Group, why: str, *, by_quota: bool = False) -> None:
        """The group is not to be placed now, whatever room there is; it keeps nothing."""
        a, key = self._a, turn.key
        a.clear(key)
        a.note(key)
        a.holds.drop(key)
        a.held_back[key] = why
        if by_quota:
            a.by_quota[key] = turn.terms.queue
        self._note(group, group.tasks, why)

    def _name(self, node_id: str) -> str:
        info = self._table.nodes.get(node_id)
        return info.name if info is not None else node_id

    # -------------------------------------------------------------- preemption

    def _may_preempt(self, turn: Turn) -> bool:
        return min(self._a.priorities, default=0) < turn.terms.priority

    def _preempt(self, turn: Turn, group: Group) -> None:
        """Stops tasks of lower priority where that makes room for the group's tasks, and keeps the
        room for them. Of a gang: for all or for none.
        """
        a = self._a
        a.preemptors[turn.key] = turn.terms
        known = a.holds.get(turn.key)
        if known is not None and known.preempts:
            a.holds.check(self._table, self._draft, self._now_ns, known)
            known = a.holds.get(turn.key)
        if known is not None and known.preempts:
            hold = known
        else:
            a.holds.drop(turn.key)
            hold = Hold(turn, replace(group, tasks=group.tasks[:1]), preempts=True)
        if turn.terms.gang:
            self._preempt_for_gang(turn, group, hold)
            return
        search = self._search(turn, group)
        for _ in range(len(group.tasks) - hold.tasks):
            choice = self._next(search, turn)
            if choice is None:
                return
            self._carry_out(choice, turn)
            a.holds.add(hold, choice.node_id, self._going(choice.node_id))

    def _next(self, search: Search, turn: Turn) -> Choice | None:
        if self._asked >= ASKED_MAX:
            self._a.due.add(turn.key)
            return None
        before = search.asked
        choice = search.next()
        self._asked += search.asked - before
        return choice

    def _search(self, turn: Turn, group: Group) -> Search:
        """Groups with the same need and terms go on where the last one has come to: what one has
        not found, the next does not look for.
        """
        a, need = self._a, group.requirement
        only = group.service_id if need.of_service or turn.terms.gang else ""
        key = (need, turn.terms, group.node_id, only)
        found = self._searches.get(key)
        if found is not None:
            return found
        group = replace(group, tasks=ghosts("anybody", group.tasks[0], 1))
        facts = Facts(
            self._draft,
            self._now_ns,
            priority=a.priority,
            gang=self._members,
            reserved=lambda node_id: [
                h.stand_ins(node_id)
                for h in a.holds.on(node_id)
                if h.turn.key == turn.key or h.binds(turn) or h.turn.terms == turn.terms
            ],
        )
        found = self._searches[key] = Search(self._table, facts, group, turn.terms.priority)
        return found

    def _members(self, service_id: str) -> Sequence[Task]:
        if not self._a.terms(service_id).gang:
            return ()
        tasks = self._draft.by(Task, "service", service_id)
        return sorted(
            (t for t in tasks if is_live(t) and state_of(t) >= TaskState.ASSIGNED),
            key=lambda t: t.id,
        )

    def _going(self, node_id: str) -> frozenset[str]:
        here = self._table.claims_on(node_id)
        return frozenset(i for i, c in here.items() if not c.active)

    def _preempt_for_gang(self, turn: Turn, group: Group, hold: Hold) -> None:
        a = self._a
        if hold.tasks >= len(group.tasks):
            return
        a.holds.drop(turn.key)
        places: Counter[str] = Counter()
        choices: list[Choice] = []
        with Trial(self._table, self._draft, self._now_ns) as trial:
            kept = a.holds.binding(turn, self._grace_ns(group.service_id), self._now_ns)
            for task in trial.place(replace(group, without=kept)):
                places[task.node_id] += 1
            search = self._search(turn, group)
            while places.total() < len(group.tasks):
                choice = self._next(search, turn)
                if choice is None:
                    return
                for task in (*choice.victims, *choice.gangs):
                    trial.out(task.id)
                for task_id in sorted(self._going(choice.node_id)):
                    trial.out(task_id)
                left = group.tasks[places.total() : places.total() + 1]
                if not trial.place(replace(group, tasks=left, node_id=choice.node_id)):
                    return
                places[choice.node_id] += 1
                choices.append(choice)
        for choice in choices:
            self._carry_out(choice, turn)
        fresh = Hold(turn, hold.group, preempts=True)
        for node_id, count in sorted(places.items()):
            for _ in range(count):
                a.holds.add(fresh, node_id, self._going(node_id))

    def _carry_out(self, choice: Choice, turn: Turn) -> None:
        by = f"preempted by {turn.name} (priority {turn.terms.priority})"
        for task in choice.victims:
            self._stop(task, StopCause.PREEMPTED, by)
        for task in choice.gangs:
            self._stop(task, StopCause.GANG, f"a task of its gang was {by}")

    def _stop(self, task: Task, cause: StopCause, message: str) -> None:
        now = self._draft.get(Task, task.id)
        if now is None or not states.wanted(now.desired_state):
            return
        stopped = structs.replace(
            now, desired_state=TaskState.SHUTDOWN, stop_cause=cause, stop_message=message
        )
        self._draft.put(stopped)
        self._table.sync_task(task.id, stopped, self._draft)
        self._tick.touched.append(task.id)
        # Its slot gets its next task.
        self._tick.unfinished.add(task.service_id)

    # -------------------------------------------------------------- reservations

    def _reserve(self, turn: Turn) -> None:
        """Sees to it that the first blocked job has a reservation, if it comes before the turn."""
        a = self._a
        if not a.blocked or (len(a.blocked) == 1 and turn.key in a.blocked):
            return
        head = self._head()
        if head is None:
            return
        for other in [h for h in a.holds.all() if not h.preempts and h.turn.key != head[0].key]:
            a.holds.drop(other.turn.key)

    def _head(self) -> tuple[Turn, Group] | None:
        """The first blocked job that has or can have a reservation."""
        a = self._a
        sound = self._sound
        if sound is not None and a.holds.get(sound.turn.key) is sound:
            return a.blocked.get(sound.turn.key)
        if self._sought >= SOUGHT_MAX:
            return None
        kept = next((h for h in a.holds.all() if not h.preempts), None)
        if kept is not None:
            blocked = a.blocked.get(kept.turn.key)
            best = max((t.terms.priority for t, _ in a.blocked.values()), default=0)
            if (
                blocked is not None
                and kept.turn.terms.priority == best
                and kept.at_ns > self._now_ns
                and a.holds.check(self._table, self._draft, self._now_ns, kept)
            ):
                self._sound = kept
                return blocked
        order = sorted(
            a.blocked.values(),
            key=lambda b: (-b[0].terms.priority, a.ledger.share(b[0].terms.queue), b[0].place),
        )
        for turn, group in order:
            hold = a.holds.get(turn.key)
            if hold is not None and hold.preempts:
                self._sound = hold
                return turn, group
            found = self._soonest(turn, group)
            if found is None:
                a.hopeless[turn.key] = a.blocked.pop(turn.key)
                continue
            one = replace(group, tasks=group.tasks[:1])
            self._sound = Hold(turn, one, dict(found.spots), found.at_ns)
            a.holds.put(self._sound)
            return turn, group
        return None

    def _soonest(self, turn: Turn, group: Group) -> Reservation | None:
        """Where and when the job will fit; jobs that are alike are searched for once."""
        wanted = len(group.tasks) if turn.terms.gang else 1
        need = group.requirement
        alike = (need, group.node_id, wanted, group.service_id if need.of_service else "")
        if alike in self._nowhere:
            return None
        self._sought += 1
        found = soonest(self._table, self._draft, self._now_ns, group, wanted, self._ends_ns)
        if found is None:
            self._nowhere.add(alike)
        return found

    def _ends_ns(self, claim: Claim) -> int | None:
        """When a claim is given up at the latest, UNKNOWN_NS, or None: never by itself."""
        grace_ns = self._grace_ns(claim.service_id)
        if not claim.active:
            return self._now_ns + grace_ns
        terms = self._a.terms(claim.service_id)
        if not terms.job:
            return None
        if not terms.timeout_ns:
            return UNKNOWN_NS
        task = self._draft.get(Task, claim.task_id)
        status = task.status if task is not None else None
        started_ns = self._now_ns
        if task is not None and status is not None and status.state == TaskState.RUNNING:
            # As jobs.py counts it: not on the node's clock.
            started_ns = runs_since_ns(task) or started_ns
        return max(self._now_ns, started_ns + terms.timeout_ns + grace_ns)

    def _grace_ns(self, service_id: str) -> int:
        service = self._draft.get(Service, service_id)
        return stop_grace_ns(service.spec if service is not None else None)


def _without(group: Group, placed: Sequence[Task]) -> Group:
    """The group's tasks that are left."""
    got = {t.id for t in placed}
    return replace(group, tasks=[t for t in group.tasks if t.id not in got])
