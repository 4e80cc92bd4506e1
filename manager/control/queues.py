"""How the queues of jobs stand, and one waiting task in its queue; for people, from a view alone.

Whatever the control loop remembers of holds and of what is blocked, it finds anew from the same
facts; so does this. What holds a task back is asked of the Placer itself, in a draft that is thrown
away.
"""

from __future__ import annotations

from dataclasses import dataclass

from manager.control.placing import Placer
from manager.control.slots import is_unplaced
from manager.control.template import spec_of_version, state_of
from manager.control.tick import Tick
from manager.scheduler import NodeTable
from manager.scheduler.queues import Amounts, Ledger, amounts_of, specs_by_name, totals_of
from manager.scheduler.ranking import job_turn, terms_of
from manager.store import Draft, View
from swarm import states
from swarm.v1 import Cluster, Node, QueueSpec, QueueUsage, Service, Task, TaskState


@dataclass(frozen=True, slots=True)
class Standing:
    """Of a task that waits. `queue` is empty where it is no job's; `position`: how many jobs come
    before it there; `hint`: what could be done about what holds it back.
    """

    queue: str = ""
    position: int = 0
    held_back: tuple[str, ...] = ()
    hint: str = ""


def usage(view: View) -> tuple[QueueUsage, ...]:
    """All queues, `default` first. Cost: the tasks of all jobs."""
    ledger, running = _ledger(view)
    waiting = _waiting(view)
    configured = _configured(view)
    # A job's queue may have been removed by now; what it holds is told nevertheless.
    names = dict.fromkeys([*configured, *sorted({*running, *waiting})])
    found = []
    for name in names:
        held = ledger.held(name)
        found.append(
            QueueUsage(
                spec=ledger.spec(name),
                cpu_nano=held.cpu_nano,
                memory_bytes=held.memory_bytes,
                gpu_nano=held.gpu_nano,
                tasks=held.tasks,
                jobs_running=running.get(name, 0),
                waiting=tuple(s.spec.name if s.spec else "" for s in waiting.get(name, ())),
                fair_share=ledger.share(name) // 1_000_000,
            )
        )
    return tuple(found)


def standing(view: View, table: NodeTable, task: Task, *, now_ns: int) -> Standing:
    """Where a task that waits for a node stands, and what holds it back though nodes may fit.
    `table`: of the view; it is used up: all that waits is placed in a draft.
    """
    service = view.get(Service, task.service_id)
    if service is None or not is_unplaced(task):
        return Standing()
    terms = terms_of(service.spec)
    held_back, hint = _held_back(view, table, task, now_ns, terms.queue)
    if not terms.job:
        return Standing(held_back=held_back, hint=hint)
    order = [s.id for s in _waiting(view).get(terms.queue, ())]
    position = order.index(service.id) if service.id in order else 0
    return Standing(terms.queue, position, held_back, hint)


def _held_back(
    view: View, table: NodeTable, task: Task, now_ns: int, queue: str
) -> tuple[tuple[str, ...], str]:
    placer = Placer(table, explains=False)
    placer.reset(table, view)
    for other in view.all(Task):
        placer.note_task(other, view)
    placer.run(Draft(view, now_ns=now_ns), (), Tick())
    admission = placer.admission
    key = (task.service_id, task.spec_version, task.node_id)
    why = admission.held_back.get(key)
    if why is None:
        return (), ""
    if key in admission.by_quota:
        hint = f"wait until jobs of queue {queue} hold less, or raise its quota"
    elif key in admission.by_hold:
        hint = "wait until that one has its place, raise the priority, or add a node"
    else:
        hint = "wait: nothing else is in the way"
    return (why,), hint


def _ledger(view: View) -> tuple[Ledger, dict[str, int]]:
    """What the queues hold, and how many jobs of each have tasks with a place."""
    ledger = Ledger()
    ledger.configure(_configured(view))
    ledger.totals = totals_of(view.all(Node))
    running: dict[str, int] = {}
    for service in view.all(Service):
        terms = terms_of(service.spec)
        if not terms.job:
            continue
        each: dict[int, Amounts] = {}
        holds = False
        for task in view.by(Task, "service", service.id):
            state = state_of(task)
            if not task.node_id or state < TaskState.ASSIGNED or states.ended(state):
                continue
            version = task.spec_version
            if version not in each:
                each[version] = amounts_of(spec_of_version(view, service, version))
            ledger.sync(task.id, terms.queue, each[version].given(len(task.assigned_gpus)))
            holds = True
        if holds:
            running[terms.queue] = running.get(terms.queue, 0) + 1
    return ledger, running


def _waiting(view: View) -> dict[str, list[Service]]:
    """The jobs with tasks that wait, by queue, in the order in which they are next there."""
    found: dict[str, list[Service]] = {}
    for service in view.all(Service):
        terms = terms_of(service.spec)
        if terms.job and any(is_unplaced(t) for t in view.by(Task, "service", service.id)):
            found.setdefault(terms.queue, []).append(service)
    for services in found.values():
        services.sort(key=lambda s: job_turn(s).place)
    return found


def _configured(view: View) -> dict[str, QueueSpec]:
    for cluster in view.all(Cluster):
        return specs_by_name(cluster.spec.scheduling if cluster.spec else None)
    return specs_by_name(None)
