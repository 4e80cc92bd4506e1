"""Who waits is remembered until there is a place, whatever else becomes of its service."""

from __future__ import annotations

from msgspec import structs

from manager.store import Change, Draft, View
from swarm.v1 import EndpointSpec, PortConfig, ServiceSpec, Task, TaskState
from tests.unit.control.world import World, make_spec

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
