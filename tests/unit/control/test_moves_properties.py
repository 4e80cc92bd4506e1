"""Nodes are drained and come back, go down, tasks crash, updates and rebalances run: with room for
all, no move ever takes a service below its budget, and in the end everything is where it should be.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import structs

from swarm.v1 import (
    Availability,
    Node,
    NodeState,
    RebalanceStatus,
    RestartPolicy,
    StopCause,
    Task,
    UpdateConfig,
)
from tests.unit.control.world import CPU, SECOND, S, World, make_node, make_spec, state_of

NODES = ("n1", "n2", "n3", "n4")
REPLICAS = 5


class Moves(RuleBasedStateMachine):
    """A service of REPLICAS; only moves take running tasks away, but for what a rule says."""

    @initialize(
        seed=st.integers(0, 1000),
        order=st.sampled_from(["", "start-first", "stop-first"]),
        parallelism=st.integers(0, 3),
        nodes=st.integers(1, 3),
    )
    def begin(self, seed: int, order: str, parallelism: int, nodes: int) -> None:
        self.world = World(0, seed=seed, history=2)
        for node_id in NODES[:nodes]:
            self.world.put(make_node(node_id, cpu=16 * CPU))
        self.order = order
        self.parallelism = parallelism or REPLICAS
        self.image = 1
        self.sid = self.world.create(self._spec(parallelism))
        self.world.settle()
        # Slots that lost what ran in them through no move, until something runs there again.
        self.excused: set[int] = set()

    def _spec(self, parallelism: int):
        update = UpdateConfig(parallelism=parallelism, order=self.order, monitor_ns=0)
        return make_spec(
            replicas=REPLICAS,
            image=f"web:{self.image}",
            cpu=CPU,
            update=update,
            restart=RestartPolicy(delay_ns=1 * SECOND),
        )

    # ------------------------------------------------------------ events

    @rule(
        node_id=st.sampled_from(NODES),
        availability=st.sampled_from([Availability.ACTIVE, Availability.DRAIN]),
    )
    def availability(self, node_id: str, availability: Availability) -> None:
        if self.world.tables.get(Node, node_id):
            self.world.set_availability(node_id, availability)

    @rule(node_id=st.sampled_from(NODES))
    def join(self, node_id: str) -> None:
        if not self.world.tables.get(Node, node_id):
            self.world.put(make_node(node_id, cpu=16 * CPU))

    @rule(node_id=st.sampled_from(NODES), up=st.booleans())
    def node_state(self, node_id: str, up: bool) -> None:
        if self.world.tables.get(Node, node_id):
            self.world.set_state(node_id, NodeState.READY if up else NodeState.DOWN)
            if not up:
                self.excused |= {t.slot for t in self._tasks() if t.node_id == node_id}

    @rule(pick=st.integers(0, 20))
    def crash(self, pick: int) -> None:
        running = [t for t in self._tasks() if state_of(t) == S.RUNNING]
        if running:
            task = running[pick % len(running)]
            self.excused.add(task.slot)
            self.world.report(task, S.FAILED)

    @rule(node_id=st.sampled_from(("", *NODES)))
    def rebalance(self, node_id: str) -> None:
        service = self.world.service(self.sid)
        now_ns = self.world.clock.now_ns()
        status = RebalanceStatus(running=True, started_at_ns=now_ns, node_id=node_id)
        self.world.put(structs.replace(service, rebalance_status=status))

    @rule(node_id=st.sampled_from(NODES))
    def freeze(self, node_id: str) -> None:
        self.world.frozen ^= {node_id}

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0]))
    def time(self, seconds: float) -> None:
        self.world.clock.advance(seconds=seconds)

    @rule(times=st.integers(1, 5))
    def go_on(self, times: int) -> None:
        for _ in range(times):
            self.world.clock.advance(seconds=0.001)
            self.world.tick()
            self.safe()
            self.world.agents()

    @rule()
    def new_leader(self) -> None:
        self.world.controller.reset(self.world.tables)

    @rule()
    def lost_commit(self) -> None:
        draft = self.world.draft()
        self.world.controller.tick(draft)
        self.world.controller.undo(self.world.tables)

    # ------------------------------------------------------------ always

    def _tasks(self) -> list[Task]:
        return sorted(self.world.tasks(self.sid), key=lambda t: t.id)

    def _up(self, node_id: str) -> bool:
        status = self.world.node(node_id).status
        return status is not None and status.state == NodeState.READY

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def safe(self) -> None:
        running = {t.slot for t in self.world.running(self.sid) if self._up(t.node_id)}
        self.excused -= running
        missing = set(range(1, REPLICAS + 1)) - running - self.excused
        budget = self.parallelism if self.order == "stop-first" else 0
        assert len(missing) <= budget, f"slots {missing} do not run"
        wanted = Counter(t.slot for t in self.world.live(self.sid) if t.desired_state == S.RUNNING)
        most = 1 if self.order == "stop-first" else 2
        assert not wanted or max(wanted.values()) <= most
        on_the_move = sum(
            1 for n in Counter(t.slot for t in self.world.live(self.sid)).values() if n > 1
        )
        assert on_the_move <= self.parallelism
        self.world.controller.check_invariants(self.world.tables)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.frozen.clear()
        drained = set()
        for i, node in enumerate(sorted(world.tables.all(Node), key=lambda n: n.id)):
            world.set_state(node.id, NodeState.READY)
            if i == 0:
                world.set_availability(node.id, Availability.DRAIN)
                drained.add(node.id)
            else:
                world.set_availability(node.id, Availability.ACTIVE)
        world.put(make_node("spare", cpu=16 * CPU))
        world.pass_time(400, step=5)
        status = world.service(self.sid).rebalance_status
        assert status is None or not status.running
        where = Counter(t.node_id for t in world.running(self.sid))
        assert where.total() == REPLICAS == len(world.live(self.sid))
        assert not drained & set(where)
        assert all(
            t.stop_message
            for t in self._tasks()
            if t.stop_cause == StopCause.MOVED and t.desired_state == S.SHUTDOWN
        )
        self.rebalance("")
        world.pass_time(20)
        after = Counter(t.node_id for t in world.running(self.sid))
        active = [n.id for n in world.tables.all(Node) if n.id not in drained]
        assert max(after[n] for n in active) - min(after[n] for n in active) <= 1
        world.controller.dirty.add(self.sid)
        assert world.tick() == 0


TestMoves = Moves.TestCase
TestMoves.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
