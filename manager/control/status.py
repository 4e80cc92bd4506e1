"""How far a service has come, worked out from its objects and the time alone: what `stack deploy`
waits for, what `service ls` shows, and what the API gives to clients that watch a roll-out.
"""

from __future__ import annotations

import re
from collections import Counter, deque

from manager.control.gates import Gates, holding, words
from manager.control.slots import Slot, is_live, lost_at_ns, silent, slot_of, slot_order
from manager.control.stuck import (
    BE,
    BY_ITSELF,
    Facts,
    Trouble,
    backs_off,
    failure,
    is_open,
    newest_failure,
    settles_ns,
    troubles,
    waits_ns,
)
from manager.control.tally import Tally
from manager.control.template import (
    PAUSED,
    UPDATING,
    Mode,
    Templates,
    job_size,
    mode_of,
    monitor_ns,
    replicas_of,
    restart_policy,
    spec_of_version,
    state_of,
    update_config,
)
from manager.control.versions import revision
from manager.scheduler import FOR_EVER, barred, node_name, requirement_of, unseen
from manager.store import View
from swarm import states
from swarm.clock import SECOND_NS
from swarm.quantities import format_duration
from swarm.v1 import JobState, Node, Service, ServiceStatus, Task, TaskState, UpdateState

REASONS_MAX = 5
_NAMES_MAX = 5
_IN_A_ROW = re.compile(r",? \d+ times in a row$")
ROLLED_BACK = "the update failed and was rolled back to the previous version"


def up_to_date(view: View, service: Service, task: Task) -> bool:
    """Whether the task is what the service's present spec would make."""
    return Templates(view, service).up_to_date(task)


def service_status(
    view: View,
    service: Service,
    now_ns: int,
    causes: Causes | None = None,
    tally: Tally | None = None,
) -> ServiceStatus:
    """The account of one service. O(tasks of the service), for global ones O(nodes) besides, and
    for one that waits O(nodes), or that of all that it waits for, unless `causes` knows them. With
    the `tally` of a job the cost does not grow with it.

    Converged: every slot has one task of the present template that runs and has run for as long as
    tasks are watched (for jobs: has completed; a task that ended well and is not to be restarted
    counts as well), nothing that should be gone still runs, and no roll-out is under way, paused,
    or rolled back by a failure. After such a rollback a service is at rest, neither converged nor
    stuck, until the next change of its template.
    """
    account = _Account(view, service, now_ns, tally)
    stuck = troubles(account.facts, (causes or Causes(view, now_ns)).behind)
    reasons = list(dict.fromkeys([*(t.reason for t in stuck), *account.ordered(stuck)]))
    return ServiceStatus(
        service_id=service.id,
        name=service.spec.name if service.spec else "",
        desired=account.desired,
        running=account.running,
        completed=account.completed,
        up_to_date=account.current,
        converged=not reasons,
        reasons=tuple(reasons[:REASONS_MAX]),
        update_status=service.update_status,
        states=dict(account.states),
        stopping=account.stopping,
        removed=False,
        settles_in_ns=0 if stuck else account.settles_in_ns(),
        stuck=bool(stuck),
        failing_task_id=account.failing(stuck) if reasons else "",
        job=mode_of(service.spec).job,
        spec_version=service.spec_version,
    )


class Causes:
    """What services are stuck with that others wait for. Each is looked at once, however many wait
    for it, directly or behind each other. For as long as the view stays as it is.
    """

    def __init__(self, view: View, now_ns: int) -> None:
        self._view = view
        self._now_ns = now_ns
        # Its own first reason, and ids of the services that it waits for itself.
        self._seen: dict[str, tuple[str, tuple[str, ...]]] = {}

    def behind(self, service_id: str) -> str | None:
        """The end of a sentence on the service: what it is stuck with, or the nearest of those that
        it waits for; None: it is not stuck.
        """
        ahead = deque([service_id])
        met = {service_id}
        while ahead:
            id_ = ahead.popleft()
            reason, waits_for = self._look(id_)
            if reason:
                if id_ == service_id:
                    return f", which is stuck: {reason}"
                return f", which is stuck behind service {self._name(id_)}: {reason}"
            ahead.extend(i for i in waits_for if i not in met)
            met.update(waits_for)
        return None

    def _look(self, service_id: str) -> tuple[str, tuple[str, ...]]:
        found = self._seen.get(service_id)
        if found is None:
            service = self._view.get(Service, service_id)
            if service is None:
                return "", ()
            facts = _Account(self._view, service, self._now_ns).facts
            own = troubles(facts, lambda _: None)
            reason = own[0].reason if own else ""
            waits_for = tuple(dict.fromkeys(c.service_id for c in facts.held if c.service_id))
            found = self._seen[service_id] = reason, waits_for
        return found

    def _name(self, service_id: str) -> str:
        service = self._view.get(Service, service_id)
        return service.spec.name if service is not None and service.spec is not None else service_id


class _Account:
    """The sums, and what is in the way."""

    def __init__(
        self, view: View, service: Service, now_ns: int, tally: Tally | None = None
    ) -> None:
        self.reasons: list[str] = []
        self.weight: dict[str, int] = {}
        self.states: Counter[str] = Counter()
        self.running = self.completed = self.current = self.stopping = 0
        # Of tasks that run and are watched: how many, and for how long still.
        self.watched = 0
        self.watched_ns = 0
        self._view = view
        # Tasks that run where their runtime does not answer: the node, and when they count as lost.
        self._silent: list[tuple[Node, int]] = []
        self._service = service
        self._now_ns = now_ns
        self._mode = mode_of(service.spec)
        self._templates = Templates(view, service)
        # Reasons that go by themselves when the watch is over.
        self._passing: set[str] = set()
        self._gates = Gates(view, service)
        slots: dict[Slot, list[Task]] = {}
        # How many slots one stands for, where that is more than itself.
        self._counts: dict[Slot, int] = {}
        if tally is None:
            tasks = view.by(Task, "service", service.id)
        else:
            tasks = [t for odd in tally.odd.values() for t in odd]
            for task, count in tally.groups():
                tasks.append(task)
                self._counts[slot_of(task)] = count
        for task in tasks:
            if not (self._mode.job and task.job_iteration != service.job_iteration):
                slots.setdefault(slot_of(task), []).append(task)
            if tally is None or slot_of(task) not in self._counts:
                self._count_stopping(task)
        if tally is not None and service.pending_delete:
            for node_id, count in tally.unended():
                self.stopping += count if self._answers(node_id) else 0
        self.desired = 0 if service.pending_delete else self._desired(slots)
        self.facts = Facts(
            view=view,
            service=service,
            now_ns=now_ns,
            mode=self._mode,
            templates=self._templates,
            slots={
                slot: [t for t in tasks if t.desired_state != TaskState.REMOVE]
                for slot, tasks in slots.items()
            },
            desired=self.desired,
            gates=self._gates,
            held=holding(view, service, self._gates, tasks),
            counts=self._counts,
        )
        if service.pending_delete:
            self._because("the service is being removed", 1)
            return
        if self._mode.per_node and not self.desired and self._unseen():
            self._because("no node that it may run on has been seen yet", 1)
        self._slots(slots)
        self._roll_out()
        if self.stopping:
            plural = "task is" if self.stopping == 1 else "tasks are"
            self._because(f"{self.stopping} {plural} still stopping", self.stopping)

    # -------------------------------------------------------------- results

    def ordered(self, stuck: list[Trouble]) -> list[str]:
        """The reasons, the weightiest first, without those that the troubles tell already."""
        first = {text: i for i, text in enumerate(self.reasons)}
        kept = [r for r in self.reasons if not any(_says(t.reason, r) for t in stuck)]
        return sorted(kept, key=lambda text: (-self.weight[text], first[text]))

    def settles_in_ns(self) -> int:
        """How long until nothing but time has passed and all is well; 0: more is in the way."""
        return self.watched_ns if set(self.reasons) <= self._passing else 0

    def failing(self, stuck: list[Trouble]) -> str:
        """The task whose log says most: that of the first trouble, or the newest that failed."""
        for trouble in stuck:
            if trouble.task_id:
                return trouble.task_id
        wanted = [t for tasks in self.facts.slots.values() for t in tasks]
        if ROLLED_BACK in self.reasons:
            # Of what the rollback has undone: all versions since the one that it went back to.
            back = revision(self._view, self._service, self._service.spec_version)
            since = back.rollback_to if back is not None else 0
            wanted = [t for t in wanted if since < t.spec_version < self._service.spec_version]
        else:
            wanted = [t for t in wanted if self._templates.up_to_date(t)]
        newest = newest_failure(wanted)
        return newest.id if newest is not None else ""

    # -------------------------------------------------------------- sums

    def _because(self, text: str, weight: int) -> None:
        if text not in self.weight:
            self.reasons.append(text)
        self.weight[text] = weight

    def _count_stopping(self, task: Task) -> None:
        """Tasks on nodes that are down cannot stop now, so nobody waits for them. Of a service that
        is being removed no task is wanted, even before the control loop has told each so.
        """
        wanted = states.wanted(task.desired_state) and not self._service.pending_delete
        if wanted or states.ended(state_of(task)):
            return
        self.stopping += self._answers(task.node_id)

    def _answers(self, node_id: str) -> bool:
        node = self._view.get(Node, node_id) if node_id else None
        return node is not None and not silent(node, self._now_ns)

    def _desired(self, slots: dict[Slot, list[Task]]) -> int:
        spec = self._service.spec
        match self._mode:
            case Mode.REPLICATED:
                return replicas_of(spec)
            case Mode.REPLICATED_JOB:
                return job_size(spec)[0]
            case _:
                need = requirement_of(spec)
                nodes = {n.id for n in self._view.all(Node) if barred(n, need) is None}
                # A paused node keeps the task it has.
                kept = {str(s) for s, tasks in slots.items() if any(is_live(t) for t in tasks)}
                return len(nodes | kept)

    def _unseen(self) -> bool:
        """Whether nodes are still to be heard, as in the first moments of a cluster."""
        return any(unseen(n) and not n.revoked for n in self._view.all(Node))

    def _slots(self, slots: dict[Slot, list[Task]]) -> None:
        """Goes through the slots; each is running, done, or has its reason."""
        done = 0
        out_of_date = 0
        overlap = 0
        moving = 0
        why: Counter[str] = Counter()
        for slot in sorted(slots, key=slot_order):
            count = self._counts.get(slot, 1)
            kept = [t for t in slots[slot] if t.desired_state != TaskState.REMOVE]
            live = [t for t in kept if is_live(t)]
            self.running += count * any(state_of(t) == TaskState.RUNNING for t in live)
            fit = [t for t in live if self._templates.up_to_date(t)]
            for task in live:
                self.states[states.label(state_of(task))] += count
            runs = [t for t in fit if state_of(t) == TaskState.RUNNING]
            if runs:
                self.current += count
                others = [t for t in live if t is not runs[-1]]
                # One that is to take its place, and has none of its own yet, changes nothing.
                overlap += sum(1 for t in others if not _follows(t, runs[-1]))
                moving += any(
                    _follows(t, runs[-1]) and state_of(t) >= TaskState.ASSIGNED
                    for t in others
                    if self._templates.up_to_date(t)
                )
                if not self._mode.job:
                    done += 1
                    self._watch(runs[-1])
                    self._note_silence(runs[-1])
            elif fit:
                why[self._waiting_for(fit[-1], kept)] += count
            elif live:
                out_of_date += count
            elif (ended := _newest(kept)) is not None:
                if state_of(ended) == TaskState.COMPLETE:
                    self.states["complete"] += count
                    self.completed += count
                    done += count * self._finished(ended)
                elif self._mode.per_node and not is_open(self._view, self._service, slot):
                    continue
                else:
                    why[self._ended(ended)] += count
        over = self._service.job_status
        present = over is not None and over.iteration == self._service.job_iteration
        if over is not None and present and over.state == JobState.COMPLETE:
            # What was stopped or lost on the way is not in the way any more.
            self.completed = over.completed
            return
        self._explain_silence()
        self._explain(why, done=done, out_of_date=out_of_date, overlap=overlap, moving=moving)

    def _watch(self, task: Task) -> None:
        """Notes that a task which runs is still watched."""
        left_ns = settles_ns(self._service, task, self._now_ns)
        if left_ns:
            self.watched += 1
            self.watched_ns = max(self.watched_ns, left_ns)

    def _note_silence(self, task: Task) -> None:
        """Notes a task whose runtime does not answer, so that nobody knows whether it runs."""
        node = self._view.get(Node, task.node_id)
        if node is None or node.status is None or not node.status.unresponsive_since_ns:
            return
        spec = spec_of_version(self._view, self._service, task.spec_version)
        at_ns = lost_at_ns(node, requirement_of(spec).static.hindrance)
        if at_ns:
            self._silent.append((node, at_ns))

    def _explain_silence(self) -> None:
        if not self._silent:
            return
        names = sorted({node_name(node) for node, _ in self._silent})
        count = len(self._silent)
        runs = "runs" if count == 1 else "run"
        text = f"{runs} where the runtime does not answer ({', '.join(names[:_NAMES_MAX])}"
        text += f" and {len(names) - _NAMES_MAX} more)" if len(names) > _NAMES_MAX else ")"
        left_ns = min(at_ns for _, at_ns in self._silent) - self._now_ns
        if not self._mode.per_node and left_ns > 0:
            seconds = -(-left_ns // SECOND_NS)
            text += f"; others take over in {format_duration(seconds * SECOND_NS)}"
        self._because(self.facts.clause(count, text), count)

    def _finished(self, ended: Task) -> bool:
        """Whether a completed task is all that its slot is meant to do."""
        condition = restart_policy(self._service.spec).condition
        kept_down = self._mode.job or condition in ("none", "on-failure")
        return kept_down and self._templates.up_to_date(ended)

    def _explain(
        self, why: Counter[str], *, done: int, out_of_date: int, overlap: int, moving: int
    ) -> None:
        desired, clause = self.desired, self.facts.clause
        for text, count in sorted(why.items()):
            self._because(clause(count, text), count)
        if out_of_date:
            self._because(clause(out_of_date, f"{BE} not yet on the current version"), out_of_date)
        if overlap:
            verb, new = ("runs", "a new one") if overlap == 1 else ("run", "new ones")
            old = f"{overlap} old {self._units(overlap)}"
            self._because(f"{old} still {verb} beside {new}", overlap)
        if moving:
            self._because(clause(moving, f"{BE} moving to another node"), moving)
        explained = done + sum(why.values()) + out_of_date
        if self._mode.job and self.running:
            self._because(clause(self.running, f"{BE} running"), self.running)
            explained += self.running
        for closed in self.facts.held:
            if any(closed.what in reason for reason in self.reasons):
                continue
            self._because(self.facts.waiting(closed), max(1, desired - explained))
        if explained < desired and not self.reasons:
            missing = desired - explained
            self._because(clause(missing, f"{BE} not created yet"), missing)
        if explained > desired:
            more = explained - desired
            verb = "is" if more == 1 else "are"
            self._because(f"there {verb} {more} {self._units(more)} more than wanted", more)
        if self.watched and not self.reasons:
            # With more in the way it says little, and nobody would say when it is over.
            watched = format_duration(monitor_ns(update_config(self._service)))
            has = "has" if self.watched == 1 else "have"
            text = f"{has} just started and must keep running for {watched}"
            self._because(clause(self.watched, text), self.watched)
            self._passing.add(self.reasons[-1])

    def _units(self, count: int) -> str:
        return f"{self.facts.unit}{'' if count == 1 else 's'}"

    def _roll_out(self) -> None:
        status = self._service.update_status
        if status is None:
            return
        if status.state in PAUSED:
            # What people must hear of first.
            self._because(status.message, self.desired + 1)
        elif status.state in UPDATING:
            if not self.facts.held:
                self._because(status.message, 0)
                self._passing.add(status.message)
        elif (
            status.state == UpdateState.ROLLBACK_COMPLETED
            and not self._service.previous_spec_version
        ):
            # Only a rollback by failure forgets the version that it came from.
            self._because(ROLLED_BACK, self.desired + 1)
            self._passing.add(ROLLED_BACK)

    def _waiting_for(self, task: Task, siblings: list[Task]) -> str:
        """What a task that should run and does not is doing, as the end of a sentence."""
        state = state_of(task)
        if (closed := self._gates.loose(task.spec_version)) and (
            state < TaskState.ASSIGNED or task.desired_state == TaskState.READY
        ):
            return f"{BE} held back: the service waits {words(closed)}"
        if state < TaskState.ASSIGNED:
            # That it is for ever is said as a trouble.
            err = task.status.err.removesuffix(FOR_EVER) if task.status else ""
            return f"{BE} not placed: {err}" if err else f"{BE} not placed"
        if task.desired_state == TaskState.READY:
            before = _newest([t for t in siblings if t.id != task.id])
            if wait_ns := waits_ns(task, self._now_ns):
                ended = before is not None and state_of(before) in BY_ITSELF
                why = self.facts.why(before) + "," if before is not None and ended else "crashed"
                return f"{backs_off(wait_ns)}: {why} {task.crashes} times in a row"
            if before is not None and state_of(before) in BY_ITSELF:
                return f"{BE} waiting to be restarted: {self.facts.why(before)}"
            return f"{BE} waiting until the tasks before have stopped"
        # What another template failed of says nothing about this one.
        failed = newest_failure(filter(self._templates.up_to_date, siblings))
        last = failure(failed) if failed is not None else ""
        return f"{BE} {states.label(state)}{f', after a failure: {last}' if last else ''}"

    def _ended(self, task: Task) -> str:
        if state_of(task) in BY_ITSELF and not states.wanted(task.desired_state):
            return f"ended and will not be restarted: {self.facts.why(task)}"
        if wait_ns := waits_ns(task, self._now_ns):
            why, crashes = self.facts.why(task), task.crashes + 1
            return f"{backs_off(wait_ns)}: {why}, {crashes} times in a row"
        if state_of(task) in BY_ITSELF:
            return f"{BE} waiting to be restarted: {self.facts.why(task)}"
        return f"ended: {task.stop_message or failure(task)}"


def _follows(task: Task, running: Task) -> bool:
    """Whether the task is to take the place of the one that runs, and does not run yet."""
    made, before = task.meta, running.meta
    later = made is None or (before is not None and made.created_at_ns >= before.created_at_ns)
    return later and state_of(task) < TaskState.RUNNING


def _newest(tasks: list[Task]) -> Task | None:
    return max(tasks, key=lambda t: (t.meta.created_at_ns if t.meta else 0, t.id), default=None)


def _says(trouble: str, reason: str) -> bool:
    """Whether the trouble tells what the reason does: of the same cause, or of the same gate."""
    _, colon, cause = reason.partition(": ")
    cause = _IN_A_ROW.sub("", cause)
    if not colon:
        return trouble.startswith(reason)
    return trouble.startswith((reason, cause)) or trouble.endswith(cause)
