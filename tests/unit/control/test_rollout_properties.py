"""Roll-outs in a cluster that does not stand still: nodes that drain, fail and come back, tasks that
crash, users that scale and update again, leaders that change at any moment. The budget is kept at
each step, and when all is quiet each roll-out has come to an end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from swarm import states
from swarm.v1 import (
    Availability,
    EndpointSpec,
    NodeState,
    PortConfig,
    RestartPolicy,
    ServiceSpec,
    Task,
    UpdateConfig,
    UpdateState,
)
from tests.unit.control.world import CPU, GLOBAL, SECOND, S, World, make_spec, state_of

REPLICAS = 4
OVER = frozenset(
    {
        UpdateState.COMPLETED,
        UpdateState.PAUSED,
        UpdateState.ROLLBACK_COMPLETED,
        UpdateState.ROLLBACK_PAUSED,
    }
)
HOST_PORT = EndpointSpec(
    ports=(PortConfig(target_port=80, published_port=8080, publish_mode="host"),)
)


@dataclass(frozen=True)
class Case:
    order: str
    parallelism: int
    tight: bool  # one task fits a node
    per_node: bool
    action: str

    def spec(self, image: str) -> ServiceSpec:
        update = UpdateConfig(
            parallelism=self.parallelism,
            monitor_ns=SECOND,
            order=self.order,
            failure_action=self.action,
            max_failure_ratio=1.0 if self.action == "continue" else 0.0,
            deadline_ns=120 * SECOND,
        )
        more: dict[str, Any] = {"mode": GLOBAL} if self.per_node else {"replicas": REPLICAS}
        if self.tight:
            more["endpoint"] = HOST_PORT
        return make_spec(
            image=image,
            cpu=CPU // 2,
            restart=RestartPolicy(delay_ns=SECOND // 2),
            update=update,
            rollback=structs.replace(update, failure_action="pause"),
            **more,
        )


def cases() -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        order=st.sampled_from(["stop-first", "start-first"]),
        parallelism=st.integers(1, 2),
        tight=st.booleans(),
        per_node=st.booleans(),
        action=st.sampled_from(["pause", "continue", "rollback"]),
    )


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["time", "time", "step", "drain", "crash", "down", "up", "leader", "update", "scale"]
        ),
        st.integers(0, 5),
    ),
    max_size=25,
)


class Budget:
    """Watches what the loop stops: no running task of the roll-out's own accord while as many slots
    are down as may be.
    """

    def __init__(self, world: World, sid: str, case: Case) -> None:
        self.world, self.sid, self.case = world, sid, case

    def tick(self) -> None:
        before = {t.id: t for t in self.world.tasks(self.sid)}
        counted = self.world.service(self.sid).update_status
        stopped_before = counted.stopped_first if counted is not None else 0
        down = self.down()
        self.world.tick()
        # A node that is drained or down is no slot of a global service any more.
        down &= {t.slot or t.node_id for t in self.world.live(self.sid)}
        counted = self.world.service(self.sid).update_status
        fell_back = (counted.stopped_first if counted is not None else 0) - stopped_before
        stopped = [t for t in self.world.tasks(self.sid) if self.was_stopped(before.get(t.id), t)]
        for_update = [t for t in stopped if not self.replaced_elsewhere(t)]
        if not for_update:
            return
        if self.case.order == "start-first":
            assert len(for_update) <= max(0, fell_back), "start-first stops what it cannot replace"
        assert len(down) + len(for_update) <= max(len(down), self.case.parallelism)

    def was_stopped(self, before: Task | None, after: Task) -> bool:
        """A task that ran, on a node that keeps it, was told to stop; not as one too many."""
        if before is None or state_of(before) != S.RUNNING:
            return False
        node = self.world.node(after.node_id)
        assert node.spec is not None and node.status is not None
        kept = (
            node.spec.availability == Availability.ACTIVE and node.status.state == NodeState.READY
        )
        return kept and states.wanted(before.desired_state) and after.desired_state == S.SHUTDOWN

    def replaced_elsewhere(self, task: Task) -> bool:
        """Another task of its slot runs."""
        return any(
            (t.slot, t.node_id if not t.slot else "")
            == (task.slot, task.node_id if not task.slot else "")
            for t in self.world.running(self.sid)
        )

    def down(self) -> set[Any]:
        """Slots that had a place, should run and do not."""
        live = self.world.live(self.sid)
        runs = {t.slot or t.node_id for t in live if state_of(t) == S.RUNNING}
        placed = {t.slot or t.node_id for t in live if state_of(t) >= S.ASSIGNED}
        return placed - runs


def happen(budget: Budget, event: str, number: int) -> None:
    world, sid = budget.world, budget.sid
    node = f"n{number % 5 + 1}"
    match event:
        case "time":
            world.clock.advance(seconds=0.5)
        case "drain":
            world.set_availability(node, Availability.DRAIN)
        case "up":
            world.set_availability(node, Availability.ACTIVE)
            world.set_state(node, NodeState.READY)
        case "down":
            world.set_state(node, NodeState.DOWN)
        case "crash":
            running = world.running(sid)
            if running:
                world.report(running[number % len(running)], S.FAILED, err="exit code 1")
        case "leader":
            world.controller.reset(world.tables)
        case "update":
            world.update(sid, budget.case.spec(f"web:{number % 3 + 1}"))
        case "scale" if not budget.case.per_node:
            world.scale(sid, number + 1)
    for _ in range(3):
        world.clock.advance(seconds=0.01)
        budget.tick()
        world.agents()


@given(cases(), EVENTS, st.booleans())
@settings(deadline=None, max_examples=120)
def test_the_budget_is_kept_and_each_roll_out_ends(
    case: Case, events: list[tuple[str, int]], broken: bool
) -> None:
    world = World(5)
    sid = world.create(case.spec("web:1"))
    world.settle()
    if broken:
        world.failing.add("web:2")
    budget = Budget(world, sid, case)
    world.update(sid, case.spec("web:2"))
    for event, number in events:
        happen(budget, event, number)
        world.controller.check_invariants(world.tables)
    for i in range(1, 6):
        world.set_availability(f"n{i}", Availability.ACTIVE)
        world.set_state(f"n{i}", NodeState.READY)
    for _ in range(500):
        world.pass_time(1, step=1)
        found = world.service(sid).update_status
        if found is None or found.state in OVER:
            break
    status = world.service(sid).update_status
    assert status is None or status.state in OVER, status
    if status is not None and status.state == UpdateState.COMPLETED and not world.failing:
        world.pass_time(10, step=1)
        assert world.at_rest(sid).converged, world.at_rest(sid).reasons
