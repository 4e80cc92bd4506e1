"""The control API as clients meet it: a unix socket, the embedded store on disk, the real control
loop beside it, and a fake of the nodes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from manager.api import ControlService, NodeFacts
from manager.ca import Sealer
from manager.control import ControlLoop
from manager.store import Draft, Store
from manager.store.engines.embedded import EmbeddedEngine
from manager.store.tables import BY_CLASS
from swarm import errors, rpc, states
from swarm.clock import SystemClock
from swarm.ids import system_rng
from swarm.rpc import Channel, Identity, Method
from swarm.v1 import (
    Caller,
    Cluster,
    ClusterSpec,
    ConfigSpec,
    CreateRequest,
    DeployStackRequest,
    ExecInput,
    ExecOutput,
    ExecStart,
    GetRequest,
    GetStackHistoryRequest,
    Kind,
    ListRequest,
    LogsRequest,
    Node,
    Platform,
    RelayFrame,
    RemoveRequest,
    Resources,
    RotateRequest,
    SecretReference,
    SecretSpec,
    Service,
    Spec,
    StackRollback,
    StackSpec,
    Task,
    TaskState,
    TaskStatus,
    UpdateConfig,
    UpdateRequest,
    WatchRequest,
    WatchServicesRequest,
)
from swarm.v1.services import CONTROL_METHODS, ControlClient
from tests.unit.api.harness import (
    FakeRelays,
    FakeTokens,
    FakeUnlockKeys,
    network,
    node,
    port,
    service,
)
from tests.unit.api.test_relays import END, lines

DEADLINE_S = 20


class FakeNodes:
    """Runs what is assigned and forgets what is to be removed, as agents and dispatcher would."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def run(self) -> None:
        with self._store.watch(("kind", Kind.TASK)) as watch:
            while True:
                async with self._store.task_writer:
                    await self._store.update(self._step)
                await anext(watch)

    def _step(self, draft: Draft) -> None:
        for task in list(draft.all(Task)):
            state = task.status.state if task.status else TaskState.NEW
            if task.desired_state == TaskState.REMOVE:
                draft.delete(Task, task.id)
            elif task.desired_state == TaskState.SHUTDOWN and not states.ended(state):
                draft.put(_with_state(task, TaskState.SHUTDOWN))
            elif task.node_id and state == TaskState.ASSIGNED:
                draft.put(_with_state(task, TaskState.RUNNING))


def _with_state(task: Task, state: TaskState) -> Task:
    return structs.replace(task, status=TaskStatus(state=state))


class Running:
    """One manager and two nodes, and a client."""

    def __init__(self, client: ControlClient, store: Store, relays: FakeRelays) -> None:
        self.client = client
        self.store = store
        self.relays = relays

    async def create(self, **spec: Any) -> str:
        return (await self.client.create(CreateRequest(spec=Spec(**spec)))).id

    async def until(self, condition: Any) -> None:
        """Waits for the store to satisfy a condition."""
        async with asyncio.timeout(DEADLINE_S):
            with self.store.watch(("all",)) as watch:
                while not condition(self.store):
                    await anext(watch)


def _authorize(method: Method, auth: dict[str, list[bytes]]) -> Identity:
    return Identity(Caller.LOCAL)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Running]:
    clock, rng = SystemClock(), system_rng()
    engine = EmbeddedEngine(tmp_path / "store.db", clock)
    store = Store(engine, clock)
    await store.open()

    def fill(draft: Draft) -> None:
        draft.put(Cluster(id="c", spec=ClusterSpec(name="default", task_history_limit=5)))
        for name in ("n1", "n2"):
            draft.put(_roomy(node(name, hostname=f"host-{name}")))

    await store.update(fill)
    relays = FakeRelays()
    control = ControlService(
        store,
        clock,
        rng,
        sealer=Sealer(b"k" * 32),
        relays=relays,
        tokens=FakeTokens(),
        unlock_keys=FakeUnlockKeys(),
        facts=NodeFacts(node_id="n1", advertise_addr="127.0.0.1:2377", version="test"),
    )
    server = rpc.server()
    server.add_generic_rpc_handlers((rpc.handler(CONTROL_METHODS, control, _authorize),))
    server.add_insecure_port(f"unix:{tmp_path / 'api.sock'}")
    await server.start()
    loop = ControlLoop(store, clock, rng, fence=await engine.campaign("n1"))
    work = [asyncio.create_task(w) for w in (control.run(), loop.run(), FakeNodes(store).run())]
    try:
        async with Channel.unix(str(tmp_path / "api.sock")) as channel:
            yield Running(ControlClient(channel), store, relays)
    finally:
        for task in work:
            task.cancel()
        ended = await asyncio.gather(*work, return_exceptions=True)
        await server.stop(0.2)
        await store.close()
    assert all(isinstance(e, asyncio.CancelledError) for e in ended), ended


def _roomy(of: Node) -> Node:
    assert of.description is not None
    return structs.replace(
        of,
        description=structs.replace(
            of.description,
            platform=Platform(architecture="x86_64", os="linux"),
            resources=Resources(cpu_nano=8 * 10**9, memory_bytes=16 * 2**30),
            runtimes=("docker",),
        ),
    )


def app(replicas: int = 2) -> StackSpec:
    return StackSpec(
        name="app",
        services=(
            service("app_web", replicas=replicas, ports=[port(8080)]),
            service("app_db", replicas=1),
        ),
        networks=(network("app_net"),),
        secrets=(SecretSpec(name="app_key", data=b"s3cret"),),
    )


async def test_stack_from_deploy_to_converged_to_gone(cluster: Running):
    client = cluster.client
    deployed = await client.deploy_stack(DeployStackRequest(spec=app()))
    assert {c.action for c in deployed.changes} == {"created"}
    watching = client.watch_services(WatchServicesRequest(stack="app"))
    async with asyncio.timeout(DEADLINE_S):
        async for response in watching:
            if all(s.converged for s in response.statuses):
                break
    running = {s.name: (s.running, s.desired) for s in response.statuses}
    assert running == {"app_web": (2, 2), "app_db": (1, 1)}

    again = await client.deploy_stack(DeployStackRequest(spec=app(replicas=5)))
    assert {c.name for c in again.changes if c.action == "updated"} == {"app_web"}
    async with asyncio.timeout(DEADLINE_S):
        async for response in client.watch_services(WatchServicesRequest(services=("app_web",))):
            if response.statuses[0].converged and response.statuses[0].running == 5:
                break

    gone = client.watch_services(WatchServicesRequest(stack="app"))
    async with asyncio.timeout(DEADLINE_S):
        await anext(aiter(gone))
        await client.remove(RemoveRequest(kind=Kind.STACK, ref="app"))
        async for response in gone:
            last = response
    assert all(s.removed for s in last.statuses)
    await cluster.until(
        lambda store: not any(store.count(c) for c in BY_CLASS if c not in (Cluster, Node))
    )


async def test_stack_is_planned_deployed_rotated_and_rolled_back(cluster: Running):
    """Every way to change a stack, with real tasks; and it leaves nothing behind."""
    client = cluster.client

    async def converged() -> None:
        async with asyncio.timeout(DEADLINE_S):
            async for response in client.watch_services(WatchServicesRequest(stack="app")):
                if all(s.converged for s in response.statuses):
                    return

    quick = UpdateConfig(monitor_ns=200_000_000)
    user = service(
        "app_web",
        container={"secrets": (SecretReference(secret_name="app_key"),)},
        update=quick,
    )
    services = (user, service("app_db", update=quick))
    first = DeployStackRequest(spec=structs.replace(app(), services=services))
    assert first.spec is not None
    await client.deploy_stack(first)
    await converged()
    second = structs.replace(
        first,
        spec=structs.replace(first.spec, secrets=(SecretSpec(name="app_key", data=b"2"),)),
    )
    planned = await client.plan_stack(second)
    assert planned.differs
    assert planned.revision == 1
    sure = structs.replace(second, expected_version=planned.version)
    deployed = await client.deploy_stack(sure)
    said = [c.change for c in planned.changes if c.change is not None]
    assert [(c.name, c.action) for c in said] == [(c.name, c.action) for c in deployed.changes]
    assert cluster.store.revision >= deployed.store_revision > 0
    with pytest.raises(errors.Conflict, match="it is at revision 2 now, the plan was made at"):
        await client.deploy_stack(sure)
    await converged()
    rotated = await client.rotate(RotateRequest(kind=Kind.SECRET, ref="app_key", data=b"3"))
    assert rotated.services == ("app_web",)
    await converged()
    back = DeployStackRequest(rollback=StackRollback(stack="app", revision=1))
    assert (await client.deploy_stack(back)).revision == 3
    await converged()
    history = await client.get_stack_history(GetStackHistoryRequest(stack="app"))
    assert [(r.revision, r.rollback_to) for r in history.revisions] == [(3, 1), (2, 0), (1, 0)]
    await client.remove(RemoveRequest(kind=Kind.STACK, ref="app"))
    await cluster.until(
        lambda store: not any(store.count(c) for c in BY_CLASS if c not in (Cluster, Node))
    )


async def test_removed_stack_can_be_deployed_again_at_once(cluster: Running):
    client = cluster.client
    first = await client.deploy_stack(DeployStackRequest(spec=app()))
    await client.remove(RemoveRequest(kind=Kind.STACK, ref="app"))
    second = await client.deploy_stack(DeployStackRequest(spec=app()))
    assert second.stack_id != first.stack_id
    assert {c.action for c in second.changes} == {"created"}


async def test_errors_keep_their_class_and_whole_message(cluster: Running):
    client = cluster.client
    with pytest.raises(errors.NotFound, match="service nope not found"):
        await client.get(GetRequest(kind=Kind.SERVICE, ref="nope"))
    many = service(container={"image": "", "env": ("=ü",) * 500}, ports=[port(99999)])
    with pytest.raises(errors.Invalid) as caught:
        await cluster.create(service=many)
    assert caught.value.message.startswith("502 problems:\n")
    assert "environment[0]: '=ü'" in caught.value.message
    await cluster.create(service=service("web"))
    with pytest.raises(errors.Conflict, match="exists already"):
        await cluster.create(service=service("web"))
    version = cluster.store.by(Service, "name", "web")[0].meta
    assert version is not None
    rename = UpdateRequest(
        kind=Kind.SERVICE,
        id="web",
        version=version.version,
        spec=Spec(service=service("other")),
    )
    with pytest.raises(errors.Unsupported, match="renaming services"):
        await client.update(rename)


async def test_updates_at_once_from_one_version_have_one_winner(cluster: Running):
    await cluster.create(config=ConfigSpec(name="conf", data=b"1"))
    found = await cluster.client.get(GetRequest(kind=Kind.CONFIG, ref="conf"))
    assert found.object is not None and found.object.config is not None
    config = found.object.config
    assert config.meta is not None
    version = config.meta.version

    async def label(value: str) -> Any:
        spec = Spec(config=ConfigSpec(name="conf", labels={"by": value}))
        return await cluster.client.update(
            UpdateRequest(kind=Kind.CONFIG, id=config.id, version=version, spec=spec)
        )

    results = await asyncio.gather(*(label(str(i)) for i in range(8)), return_exceptions=True)
    assert sum(isinstance(r, errors.Conflict) for r in results) == 7


async def test_watch_continues_a_list_without_a_gap(cluster: Running):
    for i in range(3):
        await cluster.create(config=ConfigSpec(name=f"c{i}", data=b"1"))
    listed = await cluster.client.list(ListRequest(kind=Kind.CONFIG))
    for i in range(3, 6):
        await cluster.create(config=ConfigSpec(name=f"c{i}", data=b"1"))
    stream = cluster.client.watch(
        WatchRequest(kinds=(Kind.CONFIG,), from_revision=listed.revision + 1)
    )
    names: list[str] = []
    async with asyncio.timeout(DEADLINE_S):
        async for response in stream:
            for event in response.events:
                assert event.object is not None and event.object.config is not None
                assert event.object.config.spec is not None
                names.append(event.object.config.spec.name)
            if len(names) == 3:
                break
    assert names == ["c3", "c4", "c5"]


async def test_logs_and_exec_go_through_the_relays(cluster: Running):
    await cluster.create(service=service("web", replicas=1))
    await cluster.until(
        lambda store: any(t.status and t.status.state == TaskState.RUNNING for t in store.all(Task))
    )
    (task,) = cluster.store.all(Task)
    cluster.relays.scripts = {task.id: [lines((1, "hello"), (2, "there")), END]}
    got = [
        line.data
        async for response in cluster.client.logs(LogsRequest(services=("web",)))
        for line in response.lines
    ]
    assert got == [b"hello", b"there"]

    async def echo(relays: FakeRelays) -> AsyncIterator[RelayFrame]:
        yield RelayFrame(output=ExecOutput(started=True))
        while not relays.sent:
            await asyncio.sleep(0.001)
        frame = relays.sent[0]
        assert frame.input is not None
        yield RelayFrame(output=ExecOutput(stdout=frame.input.stdin))
        yield RelayFrame(output=ExecOutput(exit_code=0))

    async def typed() -> AsyncIterator[ExecInput]:
        yield ExecInput(start=ExecStart(task="web", command=("cat",)))
        yield ExecInput(stdin=b"typed")

    cluster.relays.scripts = {task.id: echo}
    outputs = [o async for o in cluster.client.exec(typed())]
    assert outputs == [
        ExecOutput(started=True),
        ExecOutput(stdout=b"typed"),
        ExecOutput(exit_code=0),
    ]
