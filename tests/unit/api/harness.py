"""A control service over a store in memory, and short ways to ask it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from msgspec import structs

from manager.api import ControlService, NodeFacts, Relay
from manager.ca import Sealer
from manager.store import Draft, Store
from manager.store.engines.memory import MemoryEngine
from swarm import errors
from swarm.clock import ManualClock
from swarm.ids import seeded_rng
from swarm.rpc import Context, Identity
from swarm.v1 import (
    Availability,
    Caller,
    Cluster,
    ClusterSpec,
    ConfigSpec,
    ContainerSpec,
    CreateRequest,
    DeployStackRequest,
    DeployStackResponse,
    EndpointSpec,
    Filter,
    GetRequest,
    Keyring,
    Kind,
    ListRequest,
    Message,
    NetworkSpec,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    PortConfig,
    RelayFrame,
    RelayRequest,
    RemoveRequest,
    Replicated,
    SecretSpec,
    Service,
    ServiceMode,
    ServiceSpec,
    Spec,
    StackSpec,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
    UpdateRequest,
)

FACTS = NodeFacts(node_id="m", advertise_addr="10.9.0.1:2377", version="1.2.3")
CONTEXT = Context(Identity(Caller.ADMIN, name="ada"), "ipv4:127.0.0.1:1")


class FakeUnlockKeys:
    """Keys that lock nothing."""

    def __init__(self) -> None:
        self.in_force = False
        self.made = 1

    async def settle(self) -> None:
        """Nothing is locked."""

    async def key(self) -> tuple[str, bool]:
        return f"SWMKEY-1-{self.made}", self.in_force

    async def rotate(self) -> None:
        self.made, self.in_force = self.made + 1, False

    async def received(self, key: str) -> None:
        if key != f"SWMKEY-1-{self.made}":
            raise errors.Conflict("another key")
        self.in_force = True


class FakeTokens:
    """Join tokens that count their rotations."""

    def __init__(self) -> None:
        self.rotated = [0, 0]

    def worker(self) -> str:
        return f"SWMTKN-1-worker-{self.rotated[0]}"

    def manager(self) -> str:
        return f"SWMTKN-1-manager-{self.rotated[1]}"

    async def rotate(self, *, worker: bool, manager: bool) -> None:
        self.rotated[0] += worker
        self.rotated[1] += manager


class FakeRelays:
    """Answers relays from a script: task id, or node's where no task is named -> frames, or an
    error.
    """

    def __init__(self) -> None:
        self.scripts: dict[str, Any] = {}
        self.requests: list[tuple[str, RelayRequest]] = []
        self.sent: list[RelayFrame] = []

    def open(self, node_id: str, request: RelayRequest) -> AbstractAsyncContextManager[Relay]:
        return self._open(node_id, request)

    @asynccontextmanager
    async def _open(self, node_id: str, request: RelayRequest) -> AsyncIterator[Relay]:
        self.requests.append((node_id, request))
        script = self.scripts.get(request.task_id or node_id, ())
        if isinstance(script, errors.SwarmError):
            raise script
        yield FakeRelay(self, script)


class FakeRelay:
    def __init__(self, relays: FakeRelays, script: Any) -> None:
        self._relays = relays
        self._script = script

    async def frames(self) -> AsyncIterator[RelayFrame]:
        if callable(self._script):
            async for frame in self._script(self._relays):
                yield frame
            return
        for frame in self._script:
            yield frame

    async def send(self, frame: RelayFrame) -> None:
        self._relays.sent.append(frame)


class Api:
    """The service under test and what it stands on."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock()
        self.engine = MemoryEngine(self.clock)
        self.store = Store(self.engine, self.clock)
        self.sealer = Sealer(b"k" * 32)
        self.relays = FakeRelays()
        self.tokens = FakeTokens()
        self._options = options
        self._managers = 0
        self.control = self.beside()

    def beside(self) -> ControlService:
        """A control service over the same store, with locks and randomness of its own, as another
        manager's.
        """
        self._managers += 1
        return ControlService(
            self.store,
            self.clock,
            seeded_rng(self._managers),
            sealer=self.sealer,
            relays=self.relays,
            tokens=self.tokens,
            unlock_keys=FakeUnlockKeys(),
            **{"facts": FACTS, **self._options},
        )

    async def open(self) -> None:
        await self.store.open()
        await self.put(
            Cluster(id="c", spec=ClusterSpec(name="default"), store_engine="embedded"),
            Keyring(id="c"),
        )

    async def put(self, *objects: Message) -> None:
        """Writes objects past the API."""
        await self.store.update(lambda draft: [draft.put(o) for o in objects])

    async def drop(self, *objects: Any) -> None:
        """Removes objects past the API."""

        def change(draft: Draft) -> None:
            for o in objects:
                draft.delete(type(o), o.id)

        await self.store.update(change)

    def one(self, cls: type[Any], name: str) -> Any:
        found = self.store.by(cls, "name", name)
        assert len(found) == 1, f"{cls.__name__} {name}: {found}"
        return found[0]

    def stored(self, cls: type[Any], id_: str) -> Any:
        return self.store.get(cls, id_)

    def all(self, cls: type[Any]) -> list[Any]:
        return list(self.store.all(cls))

    def names(self, cls: type[Any]) -> list[str]:
        return sorted(o.spec.name for o in self.store.all(cls))

    async def create(self, auth: str = "", **spec: Any) -> str:
        response = await self.control.create(
            CreateRequest(spec=Spec(**spec), registry_auth=auth), CONTEXT
        )
        assert response.version
        return response.id

    async def update(
        self, o: Any, *, version: int = 0, rollback: bool = False, auth: str = "", **spec: Any
    ) -> int:
        kind = Kind[type(o).__name__.upper()]
        response = await self.control.update(
            UpdateRequest(
                kind=kind,
                id=o.id,
                version=version or o.meta.version,
                spec=Spec(**spec) if spec else None,
                rollback=rollback,
                registry_auth=auth,
            ),
            CONTEXT,
        )
        return response.version

    async def remove(self, kind: Kind, ref: str, *, force: bool = False) -> str:
        response = await self.control.remove(
            RemoveRequest(kind=kind, ref=ref, force=force), CONTEXT
        )
        return response.id

    async def get(self, kind: Kind, ref: str) -> Any:
        return await self.control.get(GetRequest(kind=kind, ref=ref), CONTEXT)

    async def list(self, kind: Kind, **filters: str | Sequence[str]) -> list[Any]:
        response = await self.control.list(
            ListRequest(
                kind=kind,
                filters=tuple(
                    Filter(
                        key=k.replace("__", "."), values=(v,) if isinstance(v, str) else tuple(v)
                    )
                    for k, v in filters.items()
                ),
            ),
            CONTEXT,
        )
        field = kind.name.lower()
        return [getattr(o, field) for o in response.objects]

    async def deploy(
        self, spec: StackSpec, *, prune: bool = False, auth: str = ""
    ) -> DeployStackResponse:
        return await self.control.deploy_stack(
            DeployStackRequest(spec=spec, prune=prune, registry_auth=auth), CONTEXT
        )


def service(name: str = "web", **fields: Any) -> ServiceSpec:
    """A service that is right in every way; `container`, `replicas` and `ports` are short cuts."""
    container = {"image": "nginx:1", **fields.pop("container", {})}
    task = TaskSpec(container=ContainerSpec(**container), **fields.pop("task", {}))
    if "replicas" in fields:
        fields["mode"] = ServiceMode(replicated=Replicated(replicas=fields.pop("replicas")))
    if "ports" in fields:
        fields["endpoint"] = EndpointSpec(ports=tuple(fields.pop("ports")))
    return ServiceSpec(name=name, task=task, **fields)


def port(published: int, target: int = 80, **fields: Any) -> PortConfig:
    return PortConfig(published_port=published, target_port=target, **fields)


def secret(name: str = "key", data: bytes = b"s3cret", **fields: Any) -> SecretSpec:
    return SecretSpec(name=name, data=data, **fields)


def config(name: str = "conf", data: bytes = b"x=1", **fields: Any) -> ConfigSpec:
    return ConfigSpec(name=name, data=data, **fields)


def network(name: str = "net", **fields: Any) -> NetworkSpec:
    return NetworkSpec(name=name, **fields)


def node(id_: str, hostname: str = "", **fields: Any) -> Node:
    spec = {"role": NodeRole.WORKER, "availability": Availability.ACTIVE, **fields.pop("spec", {})}
    return Node(
        id=id_,
        spec=NodeSpec(**spec),
        description=NodeDescription(hostname=hostname or id_),
        status=NodeStatus(state=fields.pop("state", NodeState.READY)),
        **fields,
    )


def task(
    id_: str,
    of: Service | str,
    slot: int = 1,
    node_id: str = "n1",
    state: TaskState = TaskState.RUNNING,
    **fields: Any,
) -> Task:
    service_id = of if isinstance(of, str) else of.id
    fields.setdefault("spec_version", 1 if isinstance(of, str) else of.spec_version)
    fields.setdefault("desired_state", TaskState.RUNNING)
    return Task(
        id=id_,
        service_id=service_id,
        slot=slot,
        node_id=node_id,
        status=TaskStatus(state=state),
        **fields,
    )


def changed(o: Any, **fields: Any) -> Any:
    return structs.replace(o, **fields)
