"""Random events against the control loop: whatever happens, no rule is broken on the way, and once it
is quiet every service has what it asked for.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import structs

from manager.scheduler import requirement_of
from swarm import states
from swarm.v1 import (
    Availability,
    Dependency,
    Node,
    NodeState,
    RestartPolicy,
    Service,
    ServiceRevision,
    Task,
    UpdateConfig,
    UpdateState,
)
from tests.unit.control.world import (
    CPU,
    GIB,
    GLOBAL,
    SECOND,
    S,
    World,
    make_node,
    make_spec,
    state_of,
)

NODES = ("n1", "n2", "n3", "n4")
SERVICES = ("a", "b")
# Replicas take whole CPUs, so there is always room for the global service's half.
NODE_CPU = 4 * CPU + CPU // 2
RESTART = RestartPolicy(delay_ns=2 * SECOND)
LOST = (NodeState.DOWN, NodeState.DISCONNECTED)
PAUSED = (UpdateState.PAUSED, UpdateState.ROLLBACK_PAUSED)


class Observed(World):
    """A world that checks each tick: no task of a gated service is let go while its gate is closed,
    and the first one of a template is not even made before all of the other service is there. Open
    is worked out here anew, from the rules in words; before or after the tick will do, since one
    tick may both stop the task that opened the gate and let one go.
    """

    def tick(self) -> int:
        services = list(self.tables.all(Service))
        one = {s.id: self._open(s) for s in services}
        all_of_it = {s.id: self._open(s, all_of_it=True) for s in services}
        before = {t.id: t for t in self.tables.all(Task)}
        images = {t.id: self.image(t) for t in before.values()}
        changed = super().tick()
        for task in self.tables.all(Task):
            service = self.tables.get(Service, task.service_id)
            if service is None:
                continue
            if _let_go(task) and not (task.id in before and _let_go(before[task.id])):
                assert one[service.id] or self._open(service), f"{task.id} of {service.id}"
            if task.id not in before and self._first(service, task, before, images):
                opened = all_of_it[service.id] or self._open(service, all_of_it=True)
                assert opened, f"{task.id}, the first of {service.id}"
        return changed

    def _first(
        self, service: Service, task: Task, before: dict[str, Task], images: dict[str, str]
    ) -> bool:
        """Whether the task is the first of its template: neither one more, nor in place of one that
        was the same, nor part of a rollback.
        """
        status = service.update_status
        back = status is not None and "ROLLBACK" in status.state.name
        return not back and not any(
            t.service_id == service.id
            and (t.spec_version >= service.task_version or t.slot == task.slot)
            for t in before.values()
            if t.spec_version >= service.task_version or images[t.id] == self.image(task)
        )

    def _open(self, service: Service, *, all_of_it: bool = False) -> bool:
        for gate in service.spec.depends_on if service.spec else ():
            (other,) = self.tables.by(Service, "name", gate.service)
            assert other.spec and other.spec.mode and other.spec.mode.replicated
            assert other.spec.task and other.spec.task.container
            wanted = other.spec.mode.replicated.replicas or 0
            least = S.RUNNING if gate.condition == "service_healthy" else S.STARTING
            slots = set()
            for task in self.tables.by(Task, "service", other.id):
                node = self.tables.get(Node, task.node_id)
                fine = least <= state_of(task) <= S.RUNNING and task.desired_state <= S.RUNNING
                if all_of_it:
                    fine = fine and self.image(task) == other.spec.task.container.image
                if fine and node is not None and node.status and node.status.state not in LOST:
                    slots.add(task.slot)
            if len(slots) < (wanted if all_of_it else min(1, wanted)):
                return False
        return True


def _let_go(task: Task) -> bool:
    """Whether its node may start it, or has."""
    return task.desired_state == S.RUNNING and state_of(task) >= S.ASSIGNED


class Cluster(RuleBasedStateMachine):
    """Users, operators, nodes and tasks do what they like; the loop ticks when it gets to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Task] = {}

    @initialize(
        seed=st.integers(0, 1000),
        with_global=st.booleans(),
        condition=st.sampled_from(["", "service_started", "service_healthy"]),
    )
    def begin(self, seed: int, with_global: bool, condition: str) -> None:
        self.world = Observed(0, seed=seed, history=2)
        # b waits for a.
        self.condition = condition
        for node_id in NODES[:3]:
            self.world.put(make_node(node_id, cpu=NODE_CPU, memory=4 * GIB))
        for name in SERVICES:
            self.world.create(self._spec(name, replicas=2, image=f"{name}:1"))
        if with_global:
            self.world.create(
                make_spec("g", mode=GLOBAL, cpu=CPU // 2, image="g:1", restart=RESTART)
            )

    def _spec(self, name: str, *, replicas: int, image: str, order: str = ""):
        gate = Dependency(service="a", condition=self.condition, required=True)
        return make_spec(
            name,
            replicas=replicas,
            image=image,
            cpu=CPU,
            memory=GIB // 2,
            restart=RESTART,
            update=UpdateConfig(parallelism=1, monitor_ns=1 * SECOND, order=order),
            depends_on=(gate,) if name == "b" and self.condition else (),
        )

    # ------------------------------------------------------------ events

    @rule(name=st.sampled_from(SERVICES), replicas=st.integers(0, 6))
    def scale(self, name: str, replicas: int) -> None:
        self.world.scale(f"s-{name}", replicas)

    @rule(
        name=st.sampled_from(SERVICES),
        version=st.integers(1, 3),
        replicas=st.integers(0, 6),
        order=st.sampled_from(["", "stop-first", "start-first"]),
    )
    def update(self, name: str, version: int, replicas: int, order: str) -> None:
        image = f"{name}:{version}"
        self.world.update(
            f"s-{name}", self._spec(name, replicas=replicas, image=image, order=order)
        )

    @rule(
        node_id=st.sampled_from(NODES),
        state=st.sampled_from([NodeState.DOWN, NodeState.READY, NodeState.UNKNOWN]),
    )
    def node_state(self, node_id: str, state: NodeState) -> None:
        if self.world.tables.get(Node, node_id):
            self.world.set_state(node_id, state)

    @rule(
        node_id=st.sampled_from(NODES),
        availability=st.sampled_from([Availability.ACTIVE, Availability.PAUSE, Availability.DRAIN]),
    )
    def availability(self, node_id: str, availability: Availability) -> None:
        if self.world.tables.get(Node, node_id):
            self.world.set_availability(node_id, availability)

    @rule(node_id=st.sampled_from(NODES))
    def join_or_leave(self, node_id: str) -> None:
        if self.world.tables.get(Node, node_id):
            self.world.set_state(node_id, NodeState.DOWN)
            self.world.remove_node(node_id)
        else:
            self.world.put(make_node(node_id, cpu=NODE_CPU, memory=4 * GIB))

    @rule(pick=st.integers(0, 50), end=st.sampled_from([S.FAILED, S.COMPLETE]))
    def task_ends(self, pick: int, end: S) -> None:
        running = [
            t
            for t in sorted(self.world.tables.all(Task), key=lambda t: t.id)
            if state_of(t) == S.RUNNING and self.world.tables.get(Node, t.node_id)
        ]
        if running:
            self.world.report(running[pick % len(running)], end)

    @rule(node_id=st.sampled_from(NODES))
    def freeze(self, node_id: str) -> None:
        self.world.frozen ^= {node_id}

    @rule()
    def agents(self) -> None:
        self.world.agents()

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 90.0]))
    def time(self, seconds: float) -> None:
        self.world.clock.advance(seconds=seconds)

    @rule()
    def tick(self) -> None:
        self.world.clock.advance(seconds=0.001)
        self.world.tick()
        self.world.controller.dirty.update(s.id for s in self.world.tables.all(Service))
        before = self._but_reasons()
        self.world.tick()
        assert self._but_reasons() == before, "reconciling twice is the same as once"

    def _but_reasons(self) -> list[object]:
        """All but why tasks wait: that is told anew every few seconds, and to who is looked at."""
        tasks = sorted(self.world.tables.all(Task), key=lambda t: t.id)
        services = sorted(self.world.tables.all(Service), key=lambda s: s.id)
        bare = (
            structs.replace(t, meta=None, status=None if state_of(t) == S.PENDING else t.status)
            for t in tasks
        )
        return [*bare, *services]

    @rule()
    def lost_commit(self) -> None:
        draft = self.world.draft()
        self.world.controller.tick(draft)
        self.world.controller.undo(self.world.tables)

    @rule()
    def new_leader(self) -> None:
        self.world.controller.reset(self.world.tables)

    # ------------------------------------------------------------ always

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def safe(self) -> None:
        self._capacity()
        self._tasks()
        self.world.controller.check_invariants(self.world.tables)

    def _capacity(self) -> None:
        """What tasks hold on a node never exceeds what it has."""
        used: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for task in self.world.tables.all(Task):
            if task.node_id and S.ASSIGNED <= state_of(task) <= S.RUNNING:
                revision = self.world.tables.get(
                    ServiceRevision, f"{task.service_id}.{task.spec_version}"
                )
                assert revision is not None, "a task's version is kept"
                need = requirement_of(revision.spec)
                used[task.node_id][0] += need.cpu
                used[task.node_id][1] += need.memory
        for node_id, (cpu, memory) in used.items():
            if self.world.tables.get(Node, node_id) is not None:
                assert cpu <= NODE_CPU and memory <= 4 * GIB, node_id

    def _tasks(self) -> None:
        now = {t.id: t for t in self.world.tables.all(Task)}
        wanted: Counter[tuple[str, int | str]] = Counter()
        for task in now.values():
            assert task.desired_state in states.DESIRED
            before = self.seen.get(task.id)
            if before is not None:
                assert state_of(task) >= state_of(before), "states only grow"
                assert before.desired_state <= task.desired_state
                assert not before.node_id or before.node_id == task.node_id
                assert before.slot == task.slot and before.spec_version == task.spec_version
            if task.desired_state == S.RUNNING and not states.ended(state_of(task)):
                wanted[task.service_id, task.slot or task.node_id] += 1
        self.seen = now
        for (service_id, slot), count in wanted.items():
            overlap = self._overlap(service_id)
            assert count <= overlap, f"{count} tasks should run in slot {slot} of {service_id}"

    def _overlap(self, service_id: str) -> int:
        """How many tasks may run side by side in a slot. It may outlast the spec that allowed it.
        Roll-outs and moves are start first when told to be, and moves unless told not to be.
        """
        specs = [r.spec for r in self.world.tables.by(ServiceRevision, "service", service_id)]
        orders = {s.update.order if s.update else "" for s in specs if s}
        if "start-first" in orders:
            return 3
        return 1 if orders == {"stop-first"} else 2

    # ------------------------------------------------------------ at last

    def teardown(self) -> None:
        """All nodes come back, with room for all; after a while everything is as it should be."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.frozen.clear()
        for node in list(world.tables.all(Node)):
            world.set_state(node.id, NodeState.READY)
            world.set_availability(node.id, Availability.ACTIVE)
        for i in range(4):
            world.put(make_node(f"spare{i}", cpu=16 * CPU, memory=16 * GIB))
        world.pass_time(5, step=0.5)
        for service in list(world.tables.all(Service)):
            if service.update_status is not None and service.update_status.state in PAUSED:
                # As the API does when it is told to go on.
                world.put(structs.replace(service, update_status=None))
        world.pass_time(200, step=5)
        self.safe()
        for service in world.tables.all(Service):
            status = world.status(service.id)
            assert status.converged, status
            assert status.running == status.desired == status.up_to_date
            assert len(world.live(service.id)) == status.desired
        world.controller.dirty.update(s.id for s in world.tables.all(Service))
        assert world.tick() == 0


TestCluster = Cluster.TestCase
TestCluster.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
