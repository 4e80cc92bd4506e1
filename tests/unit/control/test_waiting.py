"""Who waits is remembered until there is a place, whatever else becomes of its service."""

from __future__ import annotations

from msgspec import structs

from manager.store import Change, Draft, View
from swarm.v1 import (
    Dependency,
    EndpointSpec,
    NodeState,
    PortConfig,
    ServiceSpec,
    Task,
    TaskState,
)
from tests.unit.control.world import GIB, World, make_spec

PORT = EndpointSpec(
    ports=(PortConfig(target_port=80, published_port=8000, publish_mode="host"),),
)


def running(world: World, service_id: str) -> list[Task]:
    return [
        t
        for t in world.tables.by(Task, "service", service_id)
        if t.status and t.status.state == TaskState.RUNNING
    ]


def with_port(name: str, replicas: int) -> ServiceSpec:
    return make_spec(name, replicas=replicas, endpoint=PORT)


class Reordered(World):
    """What one commit removed is observed before what it put, as in a rehearsal."""

    def commit(self, draft: Draft, *, own: bool = False) -> int:
        observe, held = self.controller.observe, list[Change]()

        def hold(change: Change, view: View, *, own: bool = False) -> None:
            held.append(change)

        self.controller.observe = hold  # type: ignore[method-assign]  # this commit's alone
        try:
            count = super().commit(draft, own=own)
        finally:
            self.controller.observe = observe  # type: ignore[method-assign]
        for change in sorted(held, key=lambda c: c.new is not None):
            observe(change, self.tables, own=own)
        return count


def test_a_task_that_replaces_one_that_waits_gets_the_place_that_comes_free() -> None:
    world = Reordered(2)
    holder = world.create(with_port("holder", 2))
    world.settle()
    waiter = world.create(with_port("waiter", 1))
    world.settle()
    assert not running(world, waiter)
    # In one commit the task that waits goes and its successor begins to wait.
    [task] = world.tables.by(Task, "service", waiter)
    draft = world.draft()
    draft.delete(Task, task.id)
    draft.put(structs.replace(task, id="successor", meta=None))
    world.commit(draft, own=True)
    world.scale(holder, 1)
    world.settle()
    assert [t.id for t in running(world, waiter)] == ["successor"]


def test_what_a_gate_holds_back_by_now_is_not_told_of_nodes_again() -> None:
    world = World(2)
    world.create(make_spec("a", replicas=0, memory=9 * GIB))
    gate = (Dependency(service="a", condition="service_started", required=True),)
    sid = world.create(make_spec("b", depends_on=gate, memory=9 * GIB))
    world.settle()
    (task,) = world.tasks(sid)
    assert task.status is not None and task.status.err.startswith("no suitable node")
    world.scale("s-a", 1)  # finds no place, so the gate closes
    world.settle()
    for state in (NodeState.DOWN, NodeState.READY):
        world.set_state("n2", state)  # so there is something to tell
        for _ in range(8):
            world.clock.advance(seconds=2)
            world.tick()
            (task,) = world.tasks(sid)
            assert task.status is not None
            assert task.status.err == "waits until a task of service a has started"
