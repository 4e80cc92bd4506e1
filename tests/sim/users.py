"""What users do: calls of the real control API, through any manager, over the network.

What a call was told to be done is remembered, and must be found in the log at once and later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import structs

from swarm import errors
from swarm.clock import SECOND_NS
from swarm.ids import new_id, seeded_rng
from swarm.rpc import Context, Identity
from swarm.v1 import (
    Availability,
    Caller,
    ContainerSpec,
    CreateRequest,
    DeviceRequest,
    EndpointSpec,
    Global,
    GlobalJob,
    JobSpec,
    Kind,
    Node,
    NodeState,
    Placement,
    PortConfig,
    RemoveRequest,
    Replicated,
    ReplicatedJob,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    ResumeUpdateRequest,
    Service,
    ServiceMode,
    ServiceSpec,
    Spec,
    TaskSpec,
    UpdateConfig,
    UpdateRequest,
)
from tests.sim.plan import Item

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

CALL_S = 90.0
SERVICES_MAX = 14
ACTIONS = ("", "pause", "continue", "rollback")
GOOD = ("ok", "ok", "ok", "health", "stubborn")
BAD = ("crash", "missing", "sick", "flaky", "away", "slow", "quit")
MIB = 1 << 20


class Users:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._count = 0
        self.done = 0
        self.refused = 0
        # Services that a user was told are there, or that their removal is under way.
        self.created: dict[str, float] = {}
        self.removed: dict[str, float] = {}
        self.versions: dict[str, int] = {}  # spec_version at least

    async def act(self, item: Item) -> None:
        """Carries out one operation; what is refused is refused."""
        cluster = self._cluster
        try:
            text = await getattr(self, f"_{item.kind}")(item)
            self.done += 1
        except errors.SwarmError as error:
            self.refused += 1
            text = f"refused: {type(error).__name__}: {error.message[:90]}"
        cluster.note(f"user: {item.kind} {text}")

    # -------------------------------------------------------------- calls

    async def _call(self, item: Item, method: str, request: Any) -> Any:
        cluster = self._cluster
        manager = _pick(cluster.managers, item.lot(11))
        context = Context(Identity(Caller.ADMIN, name="user"), "ipv4:10.1.0.1:1")

        async def call(services: Any) -> Any:
            return await getattr(services.control, method)(request, context)

        return await cluster.net.ask("user", manager.address, call, CALL_S)

    async def _set_spec(self, item: Item, service: Service, spec: ServiceSpec, **more: Any) -> str:
        assert service.meta is not None
        request = UpdateRequest(
            kind=Kind.SERVICE,
            id=service.id,
            version=service.meta.version,
            spec=Spec(service=spec),
            **more,
        )
        response = await self._call(item, "update", request)
        now = self._model(service.id)
        changed = now is None or now.meta is None or now.meta.version < response.version
        if changed and service.id not in self.removed and not self._may_be_gone(service.id):
            self._cluster.violate(
                "acked-call", f"update of {spec.name} was acknowledged, and is not in the log"
            )
        return spec.name

    def _may_be_gone(self, service_id: str) -> bool:
        now = self._model(service_id)
        return now is None or now.pending_delete

    def _model(self, service_id: str) -> Service | None:
        return self._cluster.safety.model.get(Service, service_id)

    def _services(self, *, jobs: bool = False) -> list[Service]:
        found = [
            s
            for s in self._cluster.safety.model.all(Service)
            if not s.pending_delete and (jobs or not (s.spec and s.spec.job))
        ]
        return sorted(found, key=lambda s: s.id)

    def _service(self, item: Item, *, jobs: bool = False) -> tuple[Service, ServiceSpec]:
        """One of the services. Raises NotFound."""
        found = self._services(jobs=jobs)
        if not found:
            raise errors.NotFound("there is no service")
        service = _pick(found, item.lot(0))
        assert service.spec is not None
        return service, service.spec

    # -------------------------------------------------------------- services

    async def _create(self, item: Item) -> str:
        if len(self._services(jobs=True)) >= SERVICES_MAX:
            raise errors.Exhausted("there are enough services")
        self._count += 1
        return await self._make(item, self._new_spec(item, f"s{self._count}"))

    async def _job(self, item: Item) -> str:
        if len(self._services(jobs=True)) >= SERVICES_MAX:
            raise errors.Exhausted("there are enough services")
        self._count += 1
        name = f"j{self._count}"
        total = 1 + int(item.lot(1) * 8)
        gang = item.lot(2) < 0.5
        mode = ServiceMode(
            replicated_job=ReplicatedJob(
                total_completions=total,
                max_concurrent=total if gang else max(1, int(total * item.lot(3))),
            )
        )
        if item.lot(2) > 0.85:
            mode, gang = ServiceMode(global_job=GlobalJob()), False
        behaviour = "job" if item.lot(4) < 0.6 else "jobfail"
        task = TaskSpec(
            container=ContainerSpec(image=f"job:1-{behaviour}"),
            resources=_reserved(item),
            restart=RestartPolicy(
                condition="on-failure",
                delay_ns=2 * SECOND_NS,
                max_attempts=int(item.lot(5) * 4),
            ),
        )
        job = JobSpec(gang=gang)
        return await self._make(item, ServiceSpec(name=name, task=task, mode=mode, job=job))

    async def _make(self, item: Item, spec: ServiceSpec) -> str:
        response = await self._call(item, "create", CreateRequest(spec=Spec(service=spec)))
        found = self._model(response.id)
        self.created[response.id] = self._cluster.loop.now_s
        if found is None:
            self._cluster.violate(
                "acked-call", f"service {spec.name} was created, and is not in the log"
            )
        return f"{spec.name} of {spec.task.container.image if spec.task and spec.task.container else ''}"

    def _new_spec(self, item: Item, name: str) -> ServiceSpec:
        replicas = 1 + int(item.lot(0) ** 2 * 12)
        mode = ServiceMode(replicated=Replicated(replicas=replicas))
        if item.lot(1) < 0.12:
            mode = ServiceMode(global_service=Global())
        ports: tuple[PortConfig, ...] = ()
        if item.lot(2) < 0.15:
            ports = (PortConfig(target_port=80, publish_mode="host",
                                published_port=8000 + int(item.lot(3) * 4)),)  # fmt: skip
        elif item.lot(2) < 0.35:
            ports = (PortConfig(target_port=80, published_port=9000 + self._count),)
        behaviour = _pick(GOOD if item.lot(4) < 0.75 else BAD, item.lot(5))
        placement = None
        if item.lot(6) < 0.15:
            placement = Placement(
                constraints=(f"node.labels.zone == {'abc'[int(item.lot(7) * 3)]}",)
            )
        elif item.lot(6) < 0.25:
            placement = Placement(max_replicas=1 + int(item.lot(7) * 2))
        task = TaskSpec(
            container=ContainerSpec(
                image=f"app:1-{behaviour}",
                stop_grace_period_ns=(1 + int(item.lot(8) * 10)) * SECOND_NS,
            ),
            resources=_reserved(item),
            restart=_restart(item),
            placement=placement,
        )
        return ServiceSpec(
            name=name,
            task=task,
            mode=mode,
            update=_update_config(item, 3),
            rollback=_update_config(item, 7),
            endpoint=EndpointSpec(ports=ports) if ports else None,
        )

    async def _scale(self, item: Item) -> str:
        service, spec = self._service(item)
        if spec.mode is None or spec.mode.replicated is None:
            raise errors.Invalid(f"{spec.name} is not replicated")
        replicas = int(item.lot(1) ** 2 * 14)
        mode = ServiceMode(replicated=Replicated(replicas=replicas))
        await self._set_spec(item, service, structs.replace(spec, mode=mode))
        return f"{spec.name} to {replicas}"

    async def _update(self, item: Item) -> str:
        service, spec = self._service(item)
        assert spec.task is not None and spec.task.container is not None
        behaviour = _pick(GOOD if item.lot(1) < 0.6 else BAD, item.lot(2))
        image = f"app:{service.spec_version + 1}-{behaviour}"
        container = structs.replace(spec.task.container, image=image)
        task = structs.replace(spec.task, container=container)
        if item.lot(3) < 0.2:
            task = structs.replace(task, resources=_reserved(item))
        changed = structs.replace(spec, task=task)
        if item.lot(4) < 0.4:
            changed = structs.replace(changed, update=_update_config(item, 5))
        pause_after = 1 + int(item.lot(6) * 3) if item.lot(7) < 0.15 else 0
        await self._set_spec(item, service, changed, pause_after=pause_after)
        return f"{spec.name} to {image}"

    async def _tweak(self, item: Item) -> str:
        """What restarts nothing."""
        service, spec = self._service(item)
        labels = dict(spec.labels, tweak=str(int(item.lot(1) * 100)))
        return await self._set_spec(item, service, structs.replace(spec, labels=labels))

    async def _force(self, item: Item) -> str:
        service, spec = self._service(item)
        assert spec.task is not None
        task = structs.replace(spec.task, force_update=spec.task.force_update + 1)
        return await self._set_spec(item, service, structs.replace(spec, task=task))

    async def _rollback(self, item: Item) -> str:
        service, spec = self._service(item)
        assert service.meta is not None
        request = UpdateRequest(
            kind=Kind.SERVICE, id=service.id, version=service.meta.version, rollback=True
        )
        await self._call(item, "update", request)
        return spec.name

    async def _resume(self, item: Item) -> str:
        paused = [
            s
            for s in self._services()
            if s.update_status is not None and "PAUSED" in s.update_status.state.name
        ]
        if not paused:
            raise errors.NotFound("nothing is paused")
        service = _pick(paused, item.lot(0))
        await self._call(item, "resume_update", ResumeUpdateRequest(service=service.id))
        return service.spec.name if service.spec else ""

    async def _remove(self, item: Item) -> str:
        service, spec = self._service(item, jobs=True)
        await self._call(item, "remove", RemoveRequest(kind=Kind.SERVICE, ref=service.id))
        self.removed[service.id] = self._cluster.loop.now_s
        now = self._model(service.id)
        if now is not None and not now.pending_delete:
            self._cluster.violate("acked-call", f"the removal of {spec.name} is not in the log")
        return spec.name

    # -------------------------------------------------------------- nodes

    async def _set_node(self, item: Item, node: Node, **changes: Any) -> None:
        assert node.meta is not None and node.spec is not None
        spec = structs.replace(node.spec, **changes)
        request = UpdateRequest(
            kind=Kind.NODE, id=node.id, version=node.meta.version, spec=Spec(node=spec)
        )
        await self._call(item, "update", request)

    def _node(self, item: Item) -> tuple[Node, str]:
        agents = [a for a in self._cluster.agents if not a.removed]
        agent = _pick(agents, item.lot(0))
        node = self._cluster.safety.model.get(Node, agent.node_id)
        if node is None:
            raise errors.NotFound("the node is gone")
        return node, agent.host_name

    async def _availability(self, item: Item) -> str:
        node, name = self._node(item)
        words = (Availability.DRAIN, Availability.PAUSE, Availability.ACTIVE, Availability.ACTIVE)
        word = _pick(words, item.lot(1))
        closed = [
            n
            for n in self._cluster.safety.model.all(Node)
            if n.spec is not None
            and n.spec.availability in (Availability.DRAIN, Availability.PAUSE)
        ]
        if len(closed) > len(self._cluster.agents) // 3 + len(self._cluster.managers):
            word = Availability.ACTIVE
            node = _pick(sorted(closed, key=lambda n: n.id), item.lot(2))
            if node.manager_status is not None:
                raise errors.Invalid("managers run no tasks")
        await self._set_node(item, node, availability=word)
        return f"{name} {word.name.lower()}"

    async def _label(self, item: Item) -> str:
        node, name = self._node(item)
        zone = "abc"[int(item.lot(1) * 3)]
        await self._set_node(item, node, labels={"zone": zone})
        return f"{name} in zone {zone}"

    async def _node_rm(self, item: Item) -> str:
        node, name = self._node(item)
        ready = node.status is not None and node.status.state == NodeState.READY
        if sum(1 for a in self._cluster.agents if a.removed) >= len(self._cluster.agents) // 4:
            raise errors.Exhausted("enough nodes were removed")
        request = RemoveRequest(kind=Kind.NODE, ref=node.id, force=ready)
        await self._call(item, "remove", request)
        return name

    async def _node_join(self, item: Item) -> str:
        """A machine whose node was removed comes in as another node."""
        gone = [a for a in self._cluster.agents if a.removed and a.worker is not None]
        gone = [a for a in gone if a.worker is not None and not len(a.worker)]
        if not gone:
            raise errors.NotFound("no machine is without a cluster")
        agent, cluster = gone[0], self._cluster
        leader = cluster.leader()
        if leader is None or leader.store is None:
            raise errors.Unavailable("nobody lets it in")
        node_id = new_id(seeded_rng(int(item.lot(1) * 1e9)))
        agent.stop()
        agent.node_id = node_id
        node = cluster.node_of(agent)

        async def join(services: Any) -> None:
            assert leader.store is not None
            await leader.store.update(lambda draft: draft.put(node))

        await cluster.net.ask("user", leader.address, join, CALL_S)
        agent.removed = False
        agent.start()
        return agent.host_name


def _pick(found: Any, lot: float) -> Any:
    return found[min(len(found) - 1, int(lot * len(found)))]


def _reserved(item: Item) -> ResourceRequirements:
    cpu = _pick((0, 0, 250, 500, 1000, 2000), item.lot(9)) * 10**6
    memory = _pick((0, 64, 512, 1024, 3000), item.lot(10)) * MIB
    devices: tuple[DeviceRequest, ...] = ()
    if item.lot(8) < 0.16:
        devices = (DeviceRequest(driver="nvidia", count=1, capabilities=("gpu",)),)
    return ResourceRequirements(
        reservations=Resources(cpu_nano=cpu, memory_bytes=memory, devices=devices)
    )


def _restart(item: Item) -> RestartPolicy | None:
    lot = item.lot(9)
    if lot < 0.3:
        return None
    return RestartPolicy(
        condition=_pick(("any", "on-failure", "any", "none"), item.lot(10)),
        delay_ns=_pick((0, 1, 5, 10), item.lot(11)) * SECOND_NS,
        max_attempts=_pick((None, None, 1, 2, 3), lot * 7 % 1),
        window_ns=_pick((None, None, 3, 30), lot * 13 % 1) and 10 * SECOND_NS,
    )


def _update_config(item: Item, first: int) -> UpdateConfig | None:
    lot = item.lot(first)
    if lot < 0.15:
        return None
    return UpdateConfig(
        parallelism=_pick((0, 1, 1, 2, 3), item.lot(first + 1)),
        delay_ns=_pick((0, 0, 2, 10), item.lot(first + 2)) * SECOND_NS,
        failure_action=_pick(ACTIONS, item.lot(first + 3)),
        monitor_ns=_pick((None, 1, 5, 15), lot * 7 % 1) and 3 * SECOND_NS,
        max_failure_ratio=_pick((0.0, 0.0, 0.3), lot * 11 % 1),
        order=_pick(("", "stop-first", "start-first"), lot * 17 % 1),
        deadline_ns=_pick((None, 30, 60), lot * 19 % 1) and 45 * SECOND_NS,
    )
