"""A cluster in one process for tests of the control loop: tables, a clock, and nodes that do as they
are told when the test lets them. No store, no network, no threads; the same seed, the same story.
"""

from __future__ import annotations

from typing import Any

from msgspec import structs

from manager.control import Controller, needs_new_tasks, service_status
from manager.store import Draft, Tables
from swarm import states
from swarm.clock import ManualClock
from swarm.ids import seeded_rng
from swarm.v1 import (
    Availability,
    Cluster,
    ClusterSpec,
    ContainerSpec,
    Global,
    GlobalJob,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Placement,
    Platform,
    Replicated,
    ReplicatedJob,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceRevision,
    ServiceSpec,
    ServiceStatus,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
    UpdateConfig,
)

S = TaskState
GIB = 1 << 30
CPU = 1_000_000_000
SECOND = 1_000_000_000


def make_node(node_id: str, **changes: Any) -> Node:
    labels = changes.pop("labels", {})
    node = Node(
        id=node_id,
        spec=NodeSpec(
            role=changes.pop("role", NodeRole.WORKER),
            availability=changes.pop("availability", Availability.ACTIVE),
            labels=labels,
        ),
        description=NodeDescription(
            hostname=changes.pop("hostname", node_id),
            platform=Platform(architecture="x86_64", os="linux"),
            resources=Resources(
                cpu_nano=changes.pop("cpu", 4 * CPU),
                memory_bytes=changes.pop("memory", 8 * GIB),
                generic=changes.pop("generic", ()),
            ),
            runtimes=changes.pop("runtimes", ("docker", "process")),
            gpus=changes.pop("gpus", ()),
        ),
        status=NodeStatus(state=NodeState.READY, addr="10.0.0.1"),
    )
    return structs.replace(node, **changes)


def make_spec(
    name: str = "web",
    *,
    replicas: int | None = 1,
    image: str = "web:1",
    cpu: int = 0,
    memory: int = 0,
    restart: RestartPolicy | None = None,
    update: UpdateConfig | None = None,
    rollback: UpdateConfig | None = None,
    mode: ServiceMode | None = None,
    placement: Placement | None = None,
    **more: Any,
) -> ServiceSpec:
    task = TaskSpec(
        container=ContainerSpec(image=image),
        resources=ResourceRequirements(
            reservations=Resources(cpu_nano=cpu, memory_bytes=memory, **more.pop("reserved", {}))
        ),
        restart=restart,
        placement=placement,
        runtime=more.pop("runtime", ""),
    )
    mode = mode or ServiceMode(replicated=Replicated(replicas=replicas))
    return ServiceSpec(name=name, task=task, mode=mode, update=update, rollback=rollback, **more)


GLOBAL = ServiceMode(global_service=Global())
GLOBAL_JOB = ServiceMode(global_job=GlobalJob())


def job(total: int, at_once: int | None = None) -> ServiceMode:
    return ServiceMode(
        replicated_job=ReplicatedJob(total_completions=total, max_concurrent=at_once)
    )


class World:
    """The cluster. `tick` runs the control loop's pure part, `agents` lets the nodes act."""

    def __init__(self, nodes: int = 3, *, seed: int = 1, history: int = 5) -> None:
        self.clock = ManualClock()
        self.tables = Tables()
        self.rng = seeded_rng(seed)
        self.controller = Controller(self.rng)
        self.frozen: set[str] = set()  # nodes that do nothing
        self.failing: set[str] = set()  # images whose tasks fail as soon as they start
        self.skew_ns: dict[str, int] = {}  # nodes whose clocks are wrong, by how much
        self.refusing: dict[str, str] = {}  # nodes that reject all tasks, with what cause
        draft = self.draft()
        draft.put(Cluster(id="cluster", spec=ClusterSpec(task_history_limit=history)))
        for i in range(1, nodes + 1):
            draft.put(make_node(f"n{i}"))
        self.commit(draft)
        self.controller.reset(self.tables)

    # ---------------------------------------------------------- store

    def draft(self) -> Draft:
        return Draft(self.tables, now_ns=self.clock.now_ns())

    def commit(self, draft: Draft, *, own: bool = False) -> int:
        changes = draft.changes()
        if not changes:
            return 0
        revision = self.tables.revision + 1
        rows = []
        for change in changes:
            new = change.new
            if new is not None:
                new = structs.replace(new, meta=structs.replace(new.meta, version=revision))
            rows.append((change.kind, change.id, new))
        applied = self.tables.apply(revision, rows)
        for change in applied:
            self.controller.observe(change, self.tables, own=own)
        return len(applied)

    def put(self, *objects: Any) -> None:
        draft = self.draft()
        for o in objects:
            draft.put(o)
        self.commit(draft)

    # ---------------------------------------------------------- users

    def create(self, spec: ServiceSpec, service_id: str = "") -> str:
        service_id = service_id or f"s-{spec.name}"
        service = Service(id=service_id, spec=spec, spec_version=1, task_version=1)
        self.put(service, self._revision(service))
        return service_id

    def _revision(self, service: Service) -> ServiceRevision:
        return ServiceRevision(
            id=f"{service.id}.{service.spec_version}",
            service_id=service.id,
            spec_version=service.spec_version,
            spec=service.spec,
        )

    def update(self, service_id: str, spec: ServiceSpec) -> None:
        """As the API does: a new version, and the roll-out begins anew if tasks must be replaced. A
        job is always run again, as with --force.
        """
        service = self.service(service_id)
        assert service.spec is not None
        replaces = _is_job(spec) or needs_new_tasks(service.spec, spec)
        number = service.spec_version + 1
        service = structs.replace(
            service,
            spec=spec,
            spec_version=number,
            previous_spec_version=service.spec_version,
            task_version=number if replaces else service.task_version,
            update_status=None if replaces else service.update_status,
            job_iteration=service.job_iteration + (1 if _is_job(spec) else 0),
        )
        self.put(service, self._revision(service))

    def scale(self, service_id: str, replicas: int) -> None:
        """As the API does: the template is as before, so the roll-out's state stays."""
        service = self.service(service_id)
        assert service.spec is not None
        number = service.spec_version + 1
        spec = structs.replace(
            service.spec, mode=ServiceMode(replicated=Replicated(replicas=replicas))
        )
        service = structs.replace(
            service, spec=spec, spec_version=number, previous_spec_version=service.spec_version
        )
        self.put(service, self._revision(service))

    def remove(self, service_id: str) -> None:
        self.put(structs.replace(self.service(service_id), pending_delete=True))

    # ---------------------------------------------------------- nodes

    def node(self, node_id: str) -> Node:
        node = self.tables.get(Node, node_id)
        assert node is not None
        return node

    def set_state(self, node_id: str, state: NodeState) -> None:
        status = NodeStatus(state=state, addr="10.0.0.1", since_ns=self.clock.now_ns())
        self.put(structs.replace(self.node(node_id), status=status))

    def set_availability(self, node_id: str, availability: Availability) -> None:
        node = self.node(node_id)
        assert node.spec is not None
        self.put(structs.replace(node, spec=structs.replace(node.spec, availability=availability)))

    def label(self, node_id: str, **labels: str) -> None:
        node = self.node(node_id)
        assert node.spec is not None
        self.put(structs.replace(node, spec=structs.replace(node.spec, labels=labels)))

    def remove_node(self, node_id: str) -> None:
        draft = self.draft()
        draft.delete(Node, node_id)
        self.commit(draft)

    def report(self, task: Task, state: TaskState, **status: Any) -> None:
        before = task.status or TaskStatus()
        assert states.may_follow(before.state, state), f"{before.state} -> {state}"
        now = self.clock.now_ns()
        runs_ns = now if state == S.RUNNING else 0
        self.put(
            structs.replace(
                task,
                running_since_ns=task.running_since_ns or runs_ns,
                status=structs.replace(
                    before,
                    state=state,
                    timestamp_ns=now + self.skew_ns.get(task.node_id, 0),
                    **status,
                ),
            )
        )

    def agents(self, nodes: set[str] | None = None) -> bool:
        """Each node that is up and not frozen takes each of its tasks one step; False: no change."""
        acted = False
        for task in sorted(self.tables.all(Task), key=lambda t: t.id):
            node = self.tables.get(Node, task.node_id) if task.node_id else None
            if node is None or node.id in self.frozen or (nodes and node.id not in nodes):
                continue
            if node.status is None or node.status.state != NodeState.READY:
                continue
            acted |= self._step(task)
        return acted

    def _step(self, task: Task) -> bool:
        state = state_of(task)
        if state < S.ASSIGNED:
            return False
        if task.desired_state == S.REMOVE:
            draft = self.draft()
            draft.delete(Task, task.id)
            self.commit(draft)
            return True
        if states.ended(state):
            return False
        if task.desired_state == S.SHUTDOWN:
            self.report(task, S.SHUTDOWN, message="shutdown")
            return True
        if state == S.ASSIGNED:
            self.report(task, S.PREPARING)
            return True
        if state == S.PREPARING and (cause := self.refusing.get(task.node_id)):
            self.report(task, S.REJECTED, err=f"{cause} here", cause=cause)
            return True
        if state == S.PREPARING:
            self.report(task, S.READY)
            return True
        if state == S.READY and task.desired_state in (S.RUNNING, S.COMPLETE):
            if self.image(task) in self.failing:
                self.report(task, S.FAILED, err="exit code 1")
            else:
                self.report(task, S.RUNNING, message="started")
            return True
        return False

    def image(self, task: Task) -> str:
        revision = self.tables.get(ServiceRevision, f"{task.service_id}.{task.spec_version}")
        assert revision is not None, f"revision of {task.id} is gone"
        assert revision.spec is not None and revision.spec.task is not None
        assert revision.spec.task.container is not None
        return revision.spec.task.container.image

    # ---------------------------------------------------------- control loop

    def tick(self) -> int:
        """One tick, committed; how many objects it changed."""
        draft = self.draft()
        self.controller.tick(draft)
        self.controller.done()
        return self.commit(draft, own=True)

    def pass_time(self, seconds: float, *, step: float = 0.5) -> None:
        """Lets the time go by, with everybody acting every `step`."""
        left = seconds
        while left > 0:
            self.clock.advance(seconds=min(step, left))
            left -= step
            self.settle()

    def settle(self, rounds: int = 100) -> None:
        """Loop and nodes act until nothing changes any more, a millisecond a round."""
        for _ in range(rounds):
            self.clock.advance(seconds=0.001)
            changed = self.tick() if self.controller.has_work(self.clock.now_ns()) else 0
            if not self.agents() and not changed:
                return
        raise AssertionError(f"not quiet after {rounds} rounds")

    # ---------------------------------------------------------- looking

    def service(self, service_id: str) -> Service:
        service = self.tables.get(Service, service_id)
        assert service is not None
        return service

    def status(self, service_id: str) -> ServiceStatus:
        return service_status(self.tables, self.service(service_id), self.clock.now_ns())

    def at_rest(self, service_id: str) -> ServiceStatus:
        """The status as it will be once all that runs now has been watched."""
        later_ns = self.clock.now_ns() + 60 * SECOND
        return service_status(self.tables, self.service(service_id), later_ns)

    def tasks(self, service_id: str) -> list[Task]:
        found = self.tables.by(Task, "service", service_id)
        return sorted(found, key=lambda t: (t.slot, t.meta.created_at_ns if t.meta else 0, t.id))

    def live(self, service_id: str) -> list[Task]:
        return [
            t
            for t in self.tasks(service_id)
            if states.wanted(t.desired_state) and not states.ended(state_of(t))
        ]

    def running(self, service_id: str) -> list[Task]:
        return [t for t in self.live(service_id) if state_of(t) == S.RUNNING]


def state_of(task: Task) -> TaskState:
    return task.status.state if task.status else S.NEW


def _is_job(spec: ServiceSpec) -> bool:
    mode = spec.mode
    return mode is not None and (mode.replicated_job is not None or mode.global_job is not None)
