"""The tasks of a replicated job, alike ones counted together: what its status is worked out of by
who asks again and again. Pure.

Nearly all slots of a large job hold one task, which waits, runs or has completed as the others do.
A `Tally` keeps these in groups, and apart the `odd` slots whose story has to be told (more than one
task, one that failed or stops). It is built once and kept by `note`; then a status costs the groups
and the odd slots, not the job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from manager.control.slots import Slot, is_live, is_unplaced, slot_of
from manager.control.template import Mode, mode_of, state_of
from manager.store import View
from swarm import errors, states
from swarm.v1 import Service, Task, TaskState


class Tally:
    """Of one job and iteration. For `note` the view is at the change or later."""

    def __init__(self, view: View, service: Service) -> None:
        self._service_id = service.id
        self._iteration = service.job_iteration
        self._groups: dict[Hashable, dict[Slot, Task]] = {}
        self._keys: dict[Slot, Hashable] = {}
        self._nodes: Counter[str] = Counter()
        # Tasks of earlier iterations that have not gone yet are among them.
        self.odd: dict[Slot, list[Task]] = {}
        slots: dict[Slot, list[Task]] = {}
        for task in view.by(Task, "service", service.id):
            slots.setdefault(slot_of(task), []).append(task)
        for slot, tasks in slots.items():
            self._put(slot, tasks)

    @classmethod
    def of(cls, view: View, service: Service, before: Tally | None = None) -> Tally | None:
        """The service's tally, `before` if that is still the one; None: it is no replicated job."""
        if mode_of(service.spec) != Mode.REPLICATED_JOB:
            return None
        if before is not None and before._iteration == service.job_iteration:
            return before
        return cls(view, service)

    def note(self, task: Task, view: View) -> None:
        """The task has changed."""
        slot = slot_of(task)
        self._drop(slot)
        self._put(slot, view.by(Task, "slot", (self._service_id, slot)))

    def _put(self, slot: Slot, tasks: list[Task]) -> None:
        key = self._key(tasks[0]) if len(tasks) == 1 else None
        if key is not None:
            self._groups.setdefault(key, {})[slot] = tasks[0]
            self._keys[slot] = key
            if not states.ended(state_of(tasks[0])):
                self._nodes[tasks[0].node_id] += 1
        elif tasks:
            self.odd[slot] = tasks

    def _drop(self, slot: Slot) -> None:
        self.odd.pop(slot, None)
        key = self._keys.pop(slot, None)
        if key is not None:
            group = self._groups[key]
            task = group.pop(slot)
            if not states.ended(state_of(task)):
                self._nodes[task.node_id] -= 1
            if not group:
                del self._groups[key]

    def _key(self, task: Task) -> Hashable | None:
        """What tasks of one group have in common; None: it is odd."""
        if task.job_iteration != self._iteration:
            return None
        state = state_of(task)
        if not is_live(task) and (
            state != TaskState.COMPLETE or task.desired_state == TaskState.REMOVE
        ):
            return None
        said = task.status.err if task.status and is_unplaced(task) else ""
        return (state, task.desired_state, task.spec_version, said)

    def groups(self) -> list[tuple[Task, int]]:
        """One task of each group, and how many there are."""
        return [(next(iter(group.values())), len(group)) for group in self._groups.values()]

    def unended(self) -> list[tuple[str, int]]:
        """How many tasks of the groups have not ended, by node."""
        return [(node_id, count) for node_id, count in self._nodes.items() if count and node_id]

    def check_invariants(self, view: View, service: Service) -> None:
        """It is what is made of the view; for tests."""
        fresh = Tally(view, service)
        sizes = {k: set(g) for k, g in self._groups.items()}
        errors.invariant(
            sizes == {k: set(g) for k, g in fresh._groups.items()},
            f"groups of job {service.id} are off",
        )
        errors.invariant(
            Counter(t.id for ts in self.odd.values() for t in ts)
            == Counter(t.id for ts in fresh.odd.values() for t in ts),
            f"odd slots of job {service.id} are off",
        )
