"""Safety of roll-outs: how many slots they have taken down, by the log's word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.control.template import PAUSED, UPDATING, mode_of, update_config
from manager.store.tables import Change
from swarm import states
from swarm.v1 import Availability, Node, NodeState, Service, StopCause, Task, TaskState
from tests.sim.tasks import slot_of, state_of

if TYPE_CHECKING:
    from tests.sim.checks import Safety


class RollOuts:
    """A slot is taken down by a roll-out when its running task is told to stop, for no other
    reason, and until a task of it runs, or the new one has failed or lost its node.
    """

    def __init__(self, safety: Safety) -> None:
        self._safety = safety
        # Service -> began at, and slots that are down: slot -> when.
        self._down: dict[str, tuple[int, dict[int | str, float]]] = {}

    def after(self, changes: list[Change]) -> None:
        model = self._safety.model
        touched: dict[str, None] = {}
        for change in changes:
            if isinstance(o := change.new, Service):
                self._safety.machines.note_service(o)
                continue
            task = change.new or change.old
            if not isinstance(task, Task):
                continue
            service = model.get(Service, task.service_id)
            if service is None or service.update_status is None:
                self._down.pop(task.service_id, None)
                continue
            if isinstance(change.new, Task):
                old = change.old if isinstance(change.old, Task) else None
                self._task(service, old, change.new)
            touched[service.id] = None
        for service_id in touched:
            self._check(service_id)

    def _slots(self, service: Service) -> dict[int | str, float]:
        assert service.update_status is not None
        began = service.update_status.started_at_ns
        known = self._down.get(service.id)
        if known is None or known[0] != began:
            known = self._down[service.id] = (began, {})
        return known[1]

    def _task(self, service: Service, old: Task | None, new: Task) -> None:
        slots = self._slots(service)
        slot = slot_of(new)
        state = state_of(new)
        if new.desired_state == TaskState.REMOVE and not states.ended(state):
            self._safety.tasks.slot_given_up(service.id, slot)
        if (
            old is not None
            and states.wanted(old.desired_state)
            and new.desired_state == TaskState.SHUTDOWN
            and state_of(old) == state == TaskState.RUNNING
            and new.stop_cause == StopCause.UNSPECIFIED
            and new.spec_version != service.spec_version
            and self._stays(new)
            and not self._runs(service, slot)
        ):
            slots[slot] = self._safety.now_s
            status = service.update_status
            if status is not None and status.state in PAUSED:
                name = service.spec.name if service.spec else ""
                self._safety.fail("paused", f"{name} is paused, and slot {slot} is taken down")
        elif (state == TaskState.RUNNING or states.ended(state)) and (
            states.wanted(new.desired_state) or new.spec_version == service.spec_version
        ):
            # One that runs, or the new one that came to its end: it is not the roll-out's delay.
            slots.pop(slot, None)
        stopped = not states.wanted(new.desired_state)
        if new.desired_state == TaskState.REMOVE or (
            stopped and new.spec_version == service.spec_version
        ):
            slots.pop(slot, None)  # given up, or the new one has to leave for another reason

    def _stays(self, task: Task) -> bool:
        """Whether its node has no part in its end."""
        node = self._safety.model.get(Node, task.node_id)
        if node is None or node.status is None or node.status.state != NodeState.READY:
            return False
        return node.spec is None or node.spec.availability != Availability.DRAIN

    def _runs(self, service: Service, slot: int | str) -> bool:
        model = self._safety.model
        return any(
            state_of(t) == TaskState.RUNNING and states.wanted(t.desired_state)
            for t in model.by(Task, "slot", (service.id, slot))
        )

    def _check(self, service_id: str) -> None:
        service = self._safety.model.get(Service, service_id)
        if service is None or service.update_status is None or service.pending_delete:
            return
        if service.update_status.state not in UPDATING or mode_of(service.spec).job:
            return
        slots = self._slots(service)
        allowed = update_config(service).parallelism
        # One whose task lost its node meanwhile is down for another reason from then on.
        for slot in [s for s in slots if self._lost(service, s)]:
            del slots[slot]
        down = list(slots)
        if allowed and len(down) > allowed:
            name = service.spec.name if service.spec else ""
            self._safety.fail(
                "budget",
                f"the roll-out of {name} has {len(down)} slots down at once "
                f"({', '.join(str(s)[:6] for s in down)}), allowed are {allowed}",
            )

    def _lost(self, service: Service, slot: int | str) -> bool:
        model = self._safety.model
        for task in model.by(Task, "slot", (service.id, slot)):
            if not task.node_id or states.ended(state_of(task)):
                continue
            node = model.get(Node, task.node_id)
            if node is None or node.status is None or node.status.state != NodeState.READY:
                return True
        return False
