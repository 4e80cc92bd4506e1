"""Random clusters and events against the order of placement: what must hold whatever happens."""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manager.control import usage
from swarm import gpus, states
from swarm.v1 import (
    DeviceRequest,
    Gpu,
    JobSpec,
    Node,
    NodeState,
    QueueSpec,
    Replicated,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
    StopCause,
    Task,
)
from tests.unit.control.test_admission import configure
from tests.unit.control.world import (
    CPU,
    GIB,
    SECOND,
    S,
    World,
    job,
    make_node,
    make_spec,
    state_of,
)

NODES = ("n1", "n2", "n3")
POLICY = RestartPolicy(condition="on-failure", delay_ns=SECOND)
QUOTA = {"a": QueueSpec(weight=2, cpu_nano=4 * CPU), "b": QueueSpec(tasks=3, gpu_nano=CPU)}
DOWN = (NodeState.DOWN, NodeState.DISCONNECTED)


def gpu_node(node_id: str, cpu: int, count: int) -> Node:
    found = tuple(
        Gpu(uuid=f"{node_id}-g{i}", index=i, model="A", memory_bytes=8 * GIB, healthy=True)
        for i in range(count)
    )
    return make_node(node_id, cpu=cpu * CPU, memory=64 * GIB, gpus=found)


def device(share: str) -> dict[str, tuple[DeviceRequest, ...]]:
    if not share:
        return {}
    options = {} if share == "1" else {"fraction": share}
    return {"devices": (DeviceRequest(capabilities=("gpu",), count=1, options=options),)}


def holds(task: Task) -> bool:
    return bool(task.node_id) and state_of(task) >= S.ASSIGNED and not states.ended(state_of(task))


class Admission(RuleBasedStateMachine):
    """Users make services and jobs of all kinds; tasks end; nodes come and go."""

    @initialize(
        seed=st.integers(0, 1000),
        sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2)), min_size=3, max_size=3),
    )
    def begin(self, seed: int, sizes: list[tuple[int, int]]) -> None:
        self.world = World(0, seed=seed, history=1)
        self.count = 0
        self.specs: dict[str, ServiceSpec] = {}
        for node_id, (cpu, gpus_) in zip(NODES, sizes, strict=True):
            self.world.put(gpu_node(node_id, cpu, gpus_))
        configure(self.world, **QUOTA)

    # ------------------------------------------------------------ events

    @rule(
        kind=st.sampled_from(["service", "job", "gang"]),
        tasks=st.integers(1, 4),
        cpu=st.integers(1, 3),
        priority=st.sampled_from([0, 0, 0, 1, 5]),
        queue=st.sampled_from(["", "a", "b"]),
        timeout=st.sampled_from([0, 0, 20]),
        share=st.sampled_from(["", "", "", "0.5", "0.25", "1"]),
    )
    def create(
        self,
        kind: str,
        tasks: int,
        cpu: int,
        priority: int,
        queue: str,
        timeout: int,
        share: str,
    ) -> None:
        self.count += 1
        service = kind == "service"
        service_id = self.world.create(
            make_spec(
                f"s{self.count}",
                cpu=cpu * CPU,
                priority=priority,
                restart=POLICY,
                mode=ServiceMode(replicated=Replicated(replicas=tasks)) if service else job(tasks),
                job=None
                if service
                else JobSpec(queue=queue, gang=kind == "gang", timeout_ns=timeout * SECOND),
                reserved=device(share),
            )
        )
        spec = self.world.service(service_id).spec
        assert spec is not None
        self.specs[service_id] = spec  # its tasks may outlive it

    def _pick(self, pick: int) -> Service | None:
        found = sorted(self.world.tables.all(Service), key=lambda s: s.id)
        return found[pick % len(found)] if found else None

    @rule(pick=st.integers(0, 20))
    def remove(self, pick: int) -> None:
        service = self._pick(pick)
        if service is not None:
            self.world.remove(service.id)

    @rule(pick=st.integers(0, 50), end=st.sampled_from([S.COMPLETE, S.COMPLETE, S.FAILED]))
    def task_ends(self, pick: int, end: S) -> None:
        running = [
            t
            for t in sorted(self.world.tables.all(Task), key=lambda t: t.id)
            if state_of(t) == S.RUNNING
        ]
        if running:
            self.world.report(running[pick % len(running)], end)

    @rule(node_id=st.sampled_from(NODES), state=st.sampled_from([NodeState.DOWN, NodeState.READY]))
    def node_state(self, node_id: str, state: NodeState) -> None:
        self.world.set_state(node_id, state)

    @rule()
    def agents(self) -> None:
        self.world.agents()

    @rule(undo=st.booleans())
    def tick(self, undo: bool) -> None:
        if undo and self.world.controller.has_work(self.world.clock.now_ns()):
            self.world.controller.tick(self.world.draft())
            self.world.controller.undo(self.world.tables)
        self.world.tick()

    @rule(seconds=st.integers(1, 8))
    def wait(self, seconds: int) -> None:
        self.world.clock.advance(seconds=seconds)

    @rule()
    def settle(self) -> None:
        """Everybody acts until all is quiet, delays included; then the rules of rest hold."""
        self.world.pass_time(6, step=2)
        self.check_priorities()
        self.check_gangs()

    # ------------------------------------------------------------ rules

    @invariant()
    @precondition(lambda self: hasattr(self, "world"))
    def nothing_is_oversubscribed(self) -> None:
        world = self.world
        cpu: Counter[str] = Counter()
        shares: Counter[tuple[str, str]] = Counter()
        for task in world.tables.all(Task):
            if not holds(task):
                continue
            spec = self.specs[task.service_id]
            assert spec.task and spec.task.resources
            reserved = spec.task.resources.reservations
            assert reserved is not None
            cpu[task.node_id] += reserved.cpu_nano
            ask = gpus.ask_of(reserved)
            assert (ask is None) == (not task.assigned_gpus)
            for uuid in task.assigned_gpus:
                assert ask is not None
                shares[task.node_id, uuid] += ask.share
        for node_id, used in cpu.items():
            node = world.node(node_id)
            assert node.description and node.description.resources
            assert used <= node.description.resources.cpu_nano, node_id
        assert all(share <= gpus.WHOLE for share in shares.values())

    @invariant()
    @precondition(lambda self: hasattr(self, "world"))
    def quotas_are_kept(self) -> None:
        for queue in usage(self.world.tables):
            assert queue.spec is not None
            for limit, held in (
                (queue.spec.cpu_nano, queue.cpu_nano),
                (queue.spec.tasks, queue.tasks),
                (queue.spec.gpu_nano, queue.gpu_nano),
            ):
                assert not limit or held <= limit, queue

    @invariant()
    @precondition(lambda self: hasattr(self, "world"))
    def no_gang_is_placed_in_part(self) -> None:
        """Tasks that wait for a place have no sister with one that is to go on and was placed in
        the same iteration; those that lost one are on their way out, if the loop has had its turn.
        """
        if self.world.controller.has_work(self.world.clock.now_ns()):
            return
        self.check_gangs()

    def check_gangs(self) -> None:
        for service in self.world.tables.all(Service):
            assert service.spec is not None
            if service.spec.job is None or not service.spec.job.gang or service.pending_delete:
                continue
            tasks = [
                t
                for t in self.world.live(service.id)
                if t.job_iteration == service.job_iteration and not self._lost(t)
            ]
            placed = sum(holds(t) for t in tasks)
            assert placed in (0, len(tasks)), service.spec.name

    def _lost(self, task: Task) -> bool:
        node = self.world.tables.get(Node, task.node_id) if task.node_id else None
        return node is not None and node.status is not None and node.status.state in DOWN

    def check_priorities(self) -> None:
        """Nobody waits for CPUs that tasks of a lower priority have."""
        world = self.world
        on: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for task in world.tables.all(Task):
            if holds(task):
                on[task.node_id].append(self._terms(task))
        quota_held = {key[0] for key in world.controller._placer.admission.by_quota}
        for task in world.tables.all(Task):
            spec = self.specs[task.service_id]
            assert spec.task and spec.task.resources and spec.task.resources.reservations
            waits = states.wanted(task.desired_state) and state_of(task) < S.ASSIGNED
            if not waits or task.service_id in quota_held:
                continue
            if spec.task.resources.reservations.devices or (spec.job and spec.job.gang):
                continue
            priority, need = self._terms(task)
            for node in world.tables.all(Node):
                assert node.description and node.description.resources and node.status
                if node.status.state != NodeState.READY:
                    continue
                stays = sum(cpu for p, cpu in on[node.id] if p >= priority)
                lower = any(p < priority for p, _ in on[node.id])
                room = node.description.resources.cpu_nano - stays
                assert not (lower and room >= need), f"{spec.name} waits for {node.id}"

    def _terms(self, task: Task) -> tuple[int, int]:
        spec = self.specs[task.service_id]
        assert spec.task and spec.task.resources and spec.task.resources.reservations
        return spec.priority, spec.task.resources.reservations.cpu_nano

    @invariant()
    @precondition(lambda self: hasattr(self, "world"))
    def memory_agrees_with_the_view(self) -> None:
        self.world.controller.check_invariants(self.world.tables)


TestAdmission = Admission.TestCase
TestAdmission.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(
        st.tuples(
            st.integers(1, 3),  # tasks
            st.integers(1, 3),  # CPUs
            st.integers(0, 2),  # priority
            st.sampled_from(["service", "job", "gang"]),
        ),
        min_size=1,
        max_size=8,
    ),
    order=st.randoms(use_true_random=False),
)
def test_the_order_in_which_things_are_stored_changes_nothing(groups, order) -> None:
    """Nodes and services put in any order at the same time: the same tasks on the same nodes, the
    same victims.
    """
    outcomes = []
    for shuffled in (False, True):
        world = World(0)
        nodes = [make_node(n, cpu=3 * CPU) for n in NODES]
        services = list(enumerate(groups))
        if shuffled:
            order.shuffle(nodes)
            order.shuffle(services)
        world.put(*nodes)
        for i, (tasks, cpu, priority, kind) in services:
            mode = (
                ServiceMode(replicated=Replicated(replicas=tasks))
                if kind == "service"
                else job(tasks)
            )
            world.create(
                make_spec(
                    f"s{i}",
                    cpu=cpu * CPU,
                    priority=priority,
                    mode=mode,
                    job=None if kind == "service" else JobSpec(gang=kind == "gang"),
                )
            )
        world.settle()
        world.create(make_spec("last", cpu=3 * CPU, priority=3))
        world.settle()
        outcomes.append(
            sorted(
                (t.service_id, t.slot, t.node_id, state_of(t), StopCause(t.stop_cause))
                for t in world.tables.all(Task)
            )
        )
    assert outcomes[0] == outcomes[1]
