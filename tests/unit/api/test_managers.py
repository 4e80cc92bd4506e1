"""Several managers that change the same things at the same time: what must hold afterwards.

Each example is some rounds of requests that run at once, at two control services over two stores on
one log; the log's seed says in which order they get through and who hears late of whom.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import ip_network
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from structlog.testing import capture_logs

from manager.allocator import overlap
from manager.api import ControlService
from manager.api.leftovers import finish
from manager.api.lookup import spec_of
from manager.ca import Sealer
from manager.control import ids_used
from manager.store import Draft, Stale, Store
from manager.store.tables import SCHEMAS
from swarm import errors
from swarm.clock import ManualClock
from swarm.ids import seeded_rng
from swarm.v1 import (
    Cluster,
    ClusterSpec,
    Config,
    ConfigReference,
    CreateRequest,
    DeployStackRequest,
    Driver,
    IpamConfig,
    IpamOptions,
    Keyring,
    Kind,
    ManagerStatus,
    Network,
    NetworkAttachmentSpec,
    NetworkSpec,
    Node,
    NodeRole,
    Reachability,
    RemoveRequest,
    RotateRequest,
    Secret,
    SecretReference,
    Service,
    ServiceRevision,
    ServiceSpec,
    Spec,
    StackSpec,
    UpdateRequest,
)
from tests.fakes.shared_log import Replica, SharedLog
from tests.unit.api.harness import (
    CONTEXT,
    FACTS,
    FakeRelays,
    FakeTokens,
    FakeUnlockKeys,
    config,
    network,
    node,
    port,
    secret,
    service,
)

NODES = ("m1", "m2", "m3")
SERVICES = ("a", "b", "c")
SECRETS = ("s1", "s2")
CONFIGS = ("f1",)
NETWORKS = ("n1", "n2")
# What a request may be refused with. Stale, a defect and a broken invariant are none of them.
REFUSALS = (errors.Conflict, errors.Invalid, errors.NotFound)


class Two:
    """Two managers of one cluster."""

    def __init__(self, seed: int) -> None:
        clock = ManualClock()
        log = SharedLog(seed)
        self.replicas = [Replica(log, clock) for _ in range(2)]
        self.stores = [Store(replica, clock) for replica in self.replicas]
        self.controls = [
            ControlService(
                store,
                clock,
                seeded_rng(seed * 2 + i),
                sealer=Sealer(b"k" * 32),
                relays=FakeRelays(),
                tokens=FakeTokens(),
                unlock_keys=FakeUnlockKeys(),
                facts=FACTS,
                barrier=replica.barrier,
                removal_wait_s=0.0,
            )
            for i, (store, replica) in enumerate(zip(self.stores, self.replicas, strict=True))
        ]

    async def open(self) -> None:
        for store in self.stores:
            await store.open()
        await self.put(
            Cluster(id="c", spec=ClusterSpec(name="default"), store_engine="etcd"),
            Keyring(id="c"),
            *(_manager(id_) for id_ in NODES),
        )
        # Something to quarrel about from the beginning.
        control = self.controls[0]
        for spec in (
            *(Spec(secret=secret(name, b"0")) for name in SECRETS),
            *(Spec(config=config(name)) for name in CONFIGS),
            *(Spec(network=network(name)) for name in NETWORKS),
        ):
            await control.create(CreateRequest(spec=spec), CONTEXT)
        for replica in self.replicas:
            await replica.barrier()

    async def put(self, *objects: Cluster | Keyring | Node) -> None:
        await self.stores[0].update(lambda draft: [draft.put(o) for o in objects])

    async def settle(self) -> None:
        """What the leader does: services that are being removed go, and what they leave."""

        def gone(draft: Draft) -> None:
            for found in [s for s in draft.all(Service) if s.pending_delete]:
                for revision in draft.by(ServiceRevision, "service", found.id):
                    draft.delete(ServiceRevision, revision.id)
                draft.delete(Service, found.id)

        await self.stores[0].update(gone)

    async def close(self) -> None:
        for store in self.stores:
            await store.close()


def _manager(id_: str) -> Node:
    made = node(id_, spec={"role": NodeRole.MANAGER})
    assert made.description is not None
    return structs.replace(
        made,
        description=structs.replace(made.description, etcd_version="3.4.23"),
        manager_status=ManagerStatus(reachability=Reachability.REACHABLE),
    )


# ---------------------------------------------------------------- what must hold


async def check(two: Two) -> None:
    for replica in two.replicas:
        await replica.barrier()
    one, other = two.stores
    for store in two.stores:
        store.check_invariants()
    for schema in SCHEMAS:
        assert _by_id(one, schema.cls) == _by_id(other, schema.cls)
    _check_references(one)
    _check_ports(one)
    subnets = [ip_network(c.subnet) for n in one.all(Network) for c in n.ipam]
    assert not [pair for pair in combinations(subnets, 2) if overlap(*pair)]
    assert any(n.spec and n.spec.role == NodeRole.MANAGER for n in one.all(Node))


def _by_id(store: Store, cls: type[Any]) -> dict[str, Any]:
    objects: list[Any] = list(store.all(cls))
    return {o.id: o for o in objects}


def _check_references(store: Store) -> None:
    """What specs refer to exists; what was rotated has no user any more."""
    known = {o.id for o in store.all(Secret)} | {o.id for o in store.all(Config)}
    known |= {o.id for o in store.all(Network)}
    superseded = {o.id for o in store.all(Secret) if o.superseded and "stack" not in _name(o)}
    for found in store.all(Service):
        used = ids_used(spec_of(found))
        assert used <= known, f"{_name(found)} uses {used - known}, which is gone"
        assert found.pending_delete or not used & superseded, f"{_name(found)} was left out"


def _check_ports(store: Store) -> None:
    given = [
        (p.protocol or "tcp", p.published_port)
        for s in store.all(Service)
        if s.endpoint is not None and not s.pending_delete
        for p in s.endpoint.ports
    ]
    assert len(given) == len(set(given)), f"given twice: {sorted(given)}"


def _name(o: Any) -> str:
    return str(o.spec.name)


# ---------------------------------------------------------------- what is asked for

Ask = Callable[[ControlService, Store], Awaitable[object]]


@st.composite
def specs(draw: st.DrawFn, name: str) -> ServiceSpec:
    secrets = draw(st.lists(st.sampled_from(SECRETS), unique=True))
    configs = draw(st.lists(st.sampled_from(CONFIGS), unique=True))
    networks = draw(st.lists(st.sampled_from(NETWORKS), unique=True))
    ports = draw(st.lists(st.sampled_from((0, 8080, 8081)), unique=True, max_size=2))
    return service(
        name,
        container={
            "secrets": tuple(SecretReference(secret_name=s) for s in secrets),
            "configs": tuple(ConfigReference(config_name=c) for c in configs),
        },
        task={"networks": tuple(NetworkAttachmentSpec(target=n) for n in networks)},
        ports=[port(p, 80 + i) for i, p in enumerate(ports)],
    )


def create(**spec: Any) -> Ask:
    return lambda control, _: control.create(CreateRequest(spec=Spec(**spec)), CONTEXT)


def remove(kind: Kind, ref: str) -> Ask:
    return lambda control, _: control.remove(RemoveRequest(kind=kind, ref=ref), CONTEXT)


def update(spec: ServiceSpec) -> Ask:
    async def ask(control: ControlService, store: Store) -> None:
        for found in store.by(Service, "name", spec.name):
            await control.update(
                UpdateRequest(
                    kind=Kind.SERVICE,
                    id=found.id,
                    version=found.meta.version if found.meta else 0,
                    spec=Spec(service=spec),
                ),
                CONTEXT,
            )

    return ask


def rotate(name: str, data: int) -> Ask:
    request = RotateRequest(kind=Kind.SECRET, ref=name, data=b"%d" % data)
    return lambda control, _: control.rotate(request, CONTEXT)


def role(id_: str, wanted: NodeRole) -> Ask:
    async def ask(control: ControlService, store: Store) -> None:
        found = store.get(Node, id_)
        assert found is not None and found.spec is not None and found.meta is not None
        spec = Spec(node=structs.replace(found.spec, role=wanted))
        await control.update(
            UpdateRequest(kind=Kind.NODE, id=id_, version=found.meta.version, spec=spec), CONTEXT
        )

    return ask


def deploy(spec: StackSpec, *, prune: bool) -> Ask:
    request = DeployStackRequest(spec=spec, prune=prune)
    return lambda control, _: control.deploy_stack(request, CONTEXT)


async def clean_up(_: ControlService, store: Store) -> None:
    await store.update(finish)


def fixed(name: str, subnet: str) -> NetworkSpec:
    ipam = IpamOptions(driver=Driver(name="default"), configs=(IpamConfig(subnet=subnet),))
    return network(name, ipam=ipam)


@st.composite
def stacks(draw: st.DrawFn) -> Ask:
    """A stack of one service with its own secret and network, and others' as external ones."""
    spec = draw(specs("stack_web"))
    own = draw(st.booleans())
    if own:
        assert spec.task is not None and spec.task.container is not None
        used = structs.replace(
            spec.task.container,
            secrets=(*spec.task.container.secrets, SecretReference(secret_name="stack_key")),
        )
        task = structs.replace(
            spec.task,
            container=used,
            networks=(*spec.task.networks, NetworkAttachmentSpec(target="stack_net")),
        )
        spec = structs.replace(spec, task=task)
    data = draw(st.sampled_from((b"1", b"2")))
    made = StackSpec(
        name="stack",
        services=(spec,) if draw(st.booleans()) else (),
        secrets=(secret("stack_key", data),) if own else (),
        networks=(network("stack_net"),) if own else (),
    )
    return deploy(made, prune=draw(st.booleans()))


asks = st.one_of(
    st.sampled_from(SERVICES).flatmap(specs).map(lambda s: create(service=s)),
    st.sampled_from(SERVICES).flatmap(specs).map(update),
    st.sampled_from(SERVICES).map(lambda n: remove(Kind.SERVICE, n)),
    st.sampled_from(SECRETS).map(lambda n: create(secret=secret(n, b"0"))),
    st.sampled_from(SECRETS).map(lambda n: remove(Kind.SECRET, n)),
    st.builds(rotate, st.sampled_from(SECRETS), st.integers(1, 9)),
    st.sampled_from(CONFIGS).map(lambda n: create(config=config(n))),
    st.sampled_from(CONFIGS).map(lambda n: remove(Kind.CONFIG, n)),
    st.sampled_from(NETWORKS).map(lambda n: create(network=network(n))),
    st.sampled_from(NETWORKS).map(lambda n: create(network=fixed(n, "10.0.2.0/23"))),
    st.sampled_from(NETWORKS).map(lambda n: remove(Kind.NETWORK, n)),
    stacks(),
    st.just(remove(Kind.STACK, "stack")),
    st.just(clean_up),
    st.builds(role, st.sampled_from(NODES), st.sampled_from((NodeRole.WORKER, NodeRole.MANAGER))),
)
rounds = st.lists(
    st.lists(st.tuples(st.integers(0, 1), asks), min_size=1, max_size=5), min_size=1, max_size=6
)


async def run(seed: int, what: Iterable[Iterable[tuple[int, Ask]]]) -> None:
    two = Two(seed)
    await two.open()
    try:
        for wanted in what:
            asked = [ask(two.controls[i], two.stores[i]) for i, ask in wanted]
            for result in await asyncio.gather(*asked, return_exceptions=True):
                if isinstance(result, BaseException) and not isinstance(result, REFUSALS):
                    raise result
                assert not isinstance(result, Stale), result
            await check(two)
            await two.settle()
            for replica in two.replicas:
                replica.lag()
    finally:
        await two.close()


USES = service(
    "a",
    container={
        "secrets": (SecretReference(secret_name="s1"),),
        "configs": (ConfigReference(config_name="f1"),),
    },
    task={"networks": (NetworkAttachmentSpec(target="n1"),)},
)
STACK = StackSpec(name="stack", services=(structs.replace(USES, name="stack_web"),))
BARE = service("a")
# What is asked for one after the other, and then at once, at one manager and the other in turn.
RACES: dict[str, tuple[list[Ask], list[Ask]]] = {
    "secret used and removed": ([], [create(service=USES), remove(Kind.SECRET, "s1")]),
    "config used and removed": ([], [create(service=USES), remove(Kind.CONFIG, "f1")]),
    "network used and removed": ([], [create(service=USES), remove(Kind.NETWORK, "n1")]),
    "secret used by an update and removed": (
        [create(service=BARE)],
        [update(USES), remove(Kind.SECRET, "s1")],
    ),
    "secret used by a stack and removed": (
        [],
        [deploy(STACK, prune=False), remove(Kind.SECRET, "s1")],
    ),
    "secret used and rotated": ([], [create(service=USES), rotate("s1", 1)]),
    "secret rotated and removed": (
        [create(service=USES)],
        [rotate("s1", 1), remove(Kind.SECRET, "s1")],
    ),
    "secret rotated twice": ([create(service=USES)], [rotate("s1", 1), rotate("s1", 2)]),
    "one name twice": ([], [create(service=BARE), create(service=USES)]),
    "one stack twice": ([], [deploy(STACK, prune=False), deploy(STACK, prune=True)]),
    "stack deployed and removed": (
        [deploy(STACK, prune=False)],
        [deploy(STACK, prune=True), remove(Kind.STACK, "stack")],
    ),
    "stack cleaned up twice": (
        [deploy(STACK, prune=False), remove(Kind.STACK, "stack")],
        [clean_up, clean_up],
    ),
    "one port twice": (
        [],
        [create(service=service(name, ports=[port(8080)])) for name in SERVICES[:2]],
    ),
    "one port twice by an update": (
        [create(service=BARE)],
        [
            update(service("a", ports=[port(8080)])),
            create(service=service("b", ports=[port(8080)])),
        ],
    ),
    "any port twice": (
        [],
        [create(service=service(name, ports=[port(0)])) for name in SERVICES[:2]],
    ),
    "any subnet twice": ([], [create(network=network(name)) for name in ("n3", "n4")]),
    "any subnet and one that is named": (
        [],
        [create(network=network("n3")), create(network=fixed("n4", "10.0.2.0/23"))],
    ),
    "all managers demoted": ([], [role(id_, NodeRole.WORKER) for id_ in NODES]),
}


@pytest.mark.parametrize("race", RACES)
@pytest.mark.parametrize("seed", range(8))
async def test_what_clashes_does_not_pass_each_other(race: str, seed: int) -> None:
    before, at_once = RACES[race]
    rounds = [[(0, ask)] for ask in before]
    # Each seed with another manager first.
    rounds.append([((i + seed) % 2, ask) for i, ask in enumerate(at_once)])
    with capture_logs():
        await run(seed, rounds)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), rounds)
def test_nothing_is_given_out_twice_and_nothing_refers_to_what_is_gone(
    seed: int, what: list[list[tuple[int, Ask]]]
) -> None:
    with capture_logs():
        asyncio.run(run(seed, what))
