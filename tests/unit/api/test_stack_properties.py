"""Whatever is deployed, removed, rolled back and finished in whatever order: what must always hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from manager.api.history import HISTORY_MAX
from manager.api.leftovers import finish as finish_stacks
from manager.api.plan_version import plan_version
from manager.api.stack_request import resolve_request
from manager.control import ids_used
from manager.store import STACK_LABEL
from manager.store.tables import SCHEMAS
from swarm import errors
from swarm.v1 import (
    Config,
    ConfigReference,
    DeployStackRequest,
    DeployStackResponse,
    Driver,
    Kind,
    Network,
    NetworkAttachmentSpec,
    RotateRequest,
    Secret,
    SecretReference,
    Service,
    ServiceRevision,
    Stack,
    StackRevision,
    StackRollback,
    StackSpec,
    VolumeSpec,
)
from tests.unit.api.harness import CONTEXT, Api, config, network, port, secret, service

STACKS = ("a", "b")


@st.composite
def specs(draw: st.DrawFn) -> StackSpec:
    """Small stacks whose services use what they declare."""
    stack = draw(st.sampled_from(STACKS))
    nets = draw(st.lists(st.sampled_from(["n1", "n2"]), unique=True))
    keys = draw(st.dictionaries(st.sampled_from(["k1", "k2"]), st.sampled_from([b"1", b"2"])))
    confs = draw(st.dictionaries(st.sampled_from(["c1"]), st.sampled_from([b"1", b"2"])))
    services = []
    for name in draw(st.lists(st.sampled_from(["s1", "s2", "s3"]), unique=True)):
        published = draw(st.sampled_from([None, 0, 8080, 8081]))
        services.append(
            service(
                f"{stack}_{name}",
                container={
                    "image": draw(st.sampled_from(["i:1", "i:2"])),
                    "secrets": tuple(SecretReference(secret_name=f"{stack}_{k}") for k in keys),
                    "configs": tuple(ConfigReference(config_name=f"{stack}_{c}") for c in confs),
                },
                task={
                    "networks": tuple(NetworkAttachmentSpec(target=f"{stack}_{n}") for n in nets)
                },
                ports=[] if published is None else [port(published)],
            )
        )
    return StackSpec(
        name=stack,
        services=tuple(services),
        networks=tuple(network(f"{stack}_{n}") for n in nets),
        secrets=tuple(secret(f"{stack}_{k}", d) for k, d in keys.items()),
        configs=tuple(config(f"{stack}_{c}", d) for c, d in confs.items()),
    )


def published(spec: StackSpec) -> list[int]:
    ports = [p.published_port for s in spec.services if s.endpoint for p in s.endpoint.ports]
    return [p for p in ports if p]


# Nothing is wrong with these in themselves.
RIGHT = specs().filter(lambda spec: len(set(published(spec))) == len(published(spec)))

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("deploy"), specs(), st.booleans()),
        st.tuples(st.just("remove"), st.sampled_from(STACKS)),
        st.tuples(st.just("rollback"), st.integers(0, 5)),
        st.tuples(st.just("back"), st.sampled_from(STACKS), st.integers(0, 4)),
        st.tuples(
            st.just("rotate"), st.sampled_from([Kind.SECRET, Kind.CONFIG]), st.integers(0, 5)
        ),
        st.tuples(st.just("finish"), st.booleans()),
    ),
    max_size=12,
)


async def step(api: Api, what: tuple[Any, ...]) -> None:
    match what:
        case ("deploy", spec, prune):
            await api.deploy(spec, prune=prune)
            before = api.store.revision
            again = await api.deploy(spec, prune=prune)
            assert api.store.revision == before, "deploying the same twice equals once"
            assert {c.action for c in again.changes} <= {"unchanged"}
        case ("remove", name):
            await api.remove(Kind.STACK, name)
        case ("rollback", i):
            services = sorted(api.all(Service), key=lambda s: s.spec.name)
            if services:
                await api.update(services[i % len(services)], rollback=True)
        case ("back", name, number):
            await go_back(api, name, number)
        case ("rotate", kind, i):
            await rotate(api, kind, i)
        case ("finish", revisions):
            await finish(api, revisions=revisions)


async def go_back(api: Api, name: str, number: int) -> None:
    """A rollback of a stack, and that it brings back what its revision says."""
    kept = {r.revision: r for r in api.all(StackRevision) if r.spec.name == name}
    contents = {n: content_of(api, r) for n, r in kept.items()}
    request = DeployStackRequest(rollback=StackRollback(stack=name, revision=number))
    response = await api.control.deploy_stack(request, CONTEXT)
    stack = api.one(Stack, name)
    if number:
        assert stack.spec == kept[number].spec
        newest = api.stored(StackRevision, f"{stack.id}.{response.revision}")
        assert content_of(api, newest) == contents[number]
        names = {s.name for s in stack.spec.services}
        services: list[Any] = api.store.by(Service, "stack", name)
        there = {s.spec.name for s in services if not s.pending_delete}
        assert there == names


def content_of(api: Api, revision: StackRevision) -> dict[str, bytes]:
    held = {
        n: api.sealer.open(api.stored(Secret, i).sealed) for n, i in revision.secret_ids.items()
    }
    return held | {n: api.stored(Config, i).spec.data for n, i in revision.config_ids.items()}


async def rotate(api: Api, kind: Kind, i: int) -> None:
    """Exactly those who used the old content use the new one; twice is the same as once."""
    cls: Any = Secret if kind == Kind.SECRET else Config
    current = sorted((o for o in api.all(cls) if not o.superseded), key=lambda o: o.spec.name)
    if not current:
        return
    old = current[i % len(current)]
    before = {s.id: s for s in api.all(Service)}
    request = RotateRequest(kind=kind, ref=old.id, data=b"rotated", version=old.meta.version)
    response = await api.control.rotate(request, CONTEXT)
    for s in api.all(Service):
        uses = old.id in ids_used(before[s.id].spec) and not s.pending_delete
        rolled = uses and response.id != old.id
        assert (s.id in response.service_ids) == rolled
        assert (response.id in ids_used(s.spec)) or not rolled
        assert rolled or s == before[s.id], "a service that does not use it was touched"
    revision = api.store.revision
    again = await api.control.rotate(structs.replace(request, ref=response.id, version=0), CONTEXT)
    assert (again.id, again.services, api.store.revision) == (response.id, (), revision)


async def finish(api: Api, *, revisions: bool) -> None:
    """What the control loop does in its own time, and the clean-up after it."""
    for s in api.all(Service):
        kept = {s.spec_version, s.previous_spec_version}
        old = [
            r
            for r in api.store.by(ServiceRevision, "service", s.id)
            if s.pending_delete or (revisions and r.spec_version not in kept)
        ]
        await api.drop(*old, *([s] if s.pending_delete else []))
    await api.store.update(clean_up)


def clean_up(draft: Any) -> None:
    finish_stacks(draft)
    before = draft.changes()
    finish_stacks(draft)
    assert draft.changes() == before, "cleaning up twice equals once"


def check(api: Api) -> None:
    api.store.check_invariants()
    ids = {o.id for cls in (Network, Secret, Config) for o in api.all(cls)}
    ports: set[int] = set()
    for s in api.all(Service):
        assert ids_used(s.spec) <= ids, "a service refers to what does not exist"
        assert api.stored(ServiceRevision, f"{s.id}.{s.spec_version}").spec == s.spec
        for p in s.endpoint.ports if s.endpoint and not s.pending_delete else ():
            assert p.published_port
            assert p.published_port not in ports
            ports.add(p.published_port)
    for r in api.all(ServiceRevision):
        assert ids_used(r.spec) <= ids, "a spec to go back to refers to what does not exist"
    stacks = {s.spec.name for s in api.all(Stack)}
    for cls in (Network, Secret, Config, Service):
        for o in api.all(cls):
            assert o.spec.labels[STACK_LABEL] in stacks, "something is left of a stack that is gone"
    leftovers = {i for s in api.all(Stack) for i in s.leftover_ids}
    assert leftovers <= ids
    earlier = {o.id for cls in (Secret, Config) for o in api.all(cls) if o.superseded}
    assert earlier <= leftovers, "an earlier version of a stack's secret that the stack forgot"
    for stack in api.all(Stack):
        kept = sorted(r.revision for r in api.store.by(StackRevision, "stack", stack.id))
        assert len(kept) <= HISTORY_MAX
        assert stack.pending_delete or kept[-1] == stack.revision
        assert not (stack.pending_delete and kept)
    for deployed in api.all(StackRevision):
        assert api.stored(Stack, deployed.stack_id), "the history of a stack that is gone"
        assert {*deployed.secret_ids.values(), *deployed.config_ids.values()} <= ids
        assert set(deployed.secret_ids) == {s.name for s in deployed.spec.secrets}
        assert set(deployed.config_ids) == {c.name for c in deployed.spec.configs}


@given(STEPS)
@settings(deadline=None, max_examples=50)
def test_stacks_keep_their_promises(steps: list[tuple[Any, ...]]):
    async def play() -> None:
        api = Api(removal_wait_s=0.0)
        await api.open()
        for what in steps:
            before = api.store.revision
            try:
                await step(api, what)
            except errors.SwarmError:
                assert api.store.revision == before, "what was refused changed something"
            check(api)
        for name in STACKS:
            if api.store.by(Stack, "name", name):
                await api.remove(Kind.STACK, name)
        await finish(api, revisions=True)
        for cls in (Stack, StackRevision, Service, Network, Secret, Config):
            assert api.all(cls) == []
        await api.store.close()

    asyncio.run(play())


# ---------------------------------------------------------------- all or nothing

Spoil = Callable[[StackSpec], StackSpec]


def with_service(**fields: Any) -> Spoil:
    return lambda spec: structs.replace(
        spec, services=(*spec.services, service(f"{spec.name}_bad", **fields))
    )


SPOILS: dict[str, Spoil] = {
    "a service": with_service(container={"image": ""}),
    "its reference": with_service(container={"secrets": (SecretReference(secret_name="gone"),)}),
    "its port": with_service(ports=[port(7000)]),
    "its name": lambda spec: structs.replace(spec, services=(*spec.services, service("taken"))),
    "a secret": lambda spec: structs.replace(spec, secrets=(*spec.secrets, secret("x", b""))),
    "a config": lambda spec: structs.replace(
        spec, configs=(*spec.configs, config("x", b"x" * 1_024_001))
    ),
    "a network": lambda spec: structs.replace(
        spec, networks=(*spec.networks, network("x", driver=Driver(name="macvlan")))
    ),
    "a volume": lambda spec: structs.replace(spec, volumes=(VolumeSpec(name="/"),)),
    "the external": lambda spec: structs.replace(spec, external_secrets=("gone",)),
    "the stack": lambda spec: structs.replace(spec, name="no.name"),
}


@given(RIGHT, RIGHT, st.sampled_from(sorted(SPOILS)), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_problem_anywhere_leaves_all_as_it_was(
    first: StackSpec, second: StackSpec, spoil: str, prune: bool
):
    async def play() -> None:
        api = Api(removal_wait_s=0.0)
        await api.open()
        await api.create(service=service("taken", ports=[port(7000)]))
        await api.deploy(first)
        before = {(s.cls, o.id): o for s in SCHEMAS for o in api.all(s.cls)}
        with pytest.raises(errors.Invalid):
            await api.deploy(SPOILS[spoil](second), prune=prune)
        assert {(s.cls, o.id): o for s in SCHEMAS for o in api.all(s.cls)} == before
        await api.store.close()

    asyncio.run(play())


# ---------------------------------------------------------------- at the same time


@given(RIGHT, st.lists(RIGHT, min_size=2, max_size=4), st.booleans())
@settings(deadline=None, max_examples=30)
def test_of_deploys_of_one_plan_at_a_time_one_alone_is_taken(
    first: StackSpec, others: list[StackSpec], prune: bool
):
    """Through as many managers as there are deploys: their locks do not keep them apart."""
    others = [structs.replace(o, name=first.name, services=(), networks=()) for o in others]

    async def play() -> None:
        api = Api(removal_wait_s=0.0)
        await api.open()
        await api.deploy(first)
        requests = []
        for i, spec in enumerate(others):
            # Each of them is a change, and none is what another one asks for.
            spec = structs.replace(spec, secrets=(secret(f"{first.name}_new", b"%d" % i),))
            request = DeployStackRequest(spec=spec, prune=prune)
            wanted = resolve_request(api.store, request, sealer=api.sealer)
            version = plan_version(api.store, wanted, sealer=api.sealer)
            requests.append(structs.replace(request, expected_version=version))
        results = await asyncio.gather(
            *(api.beside().deploy_stack(r, CONTEXT) for r in requests), return_exceptions=True
        )
        taken = [r for r in results if isinstance(r, DeployStackResponse)]
        refused = [r for r in results if isinstance(r, errors.Conflict)]
        assert (len(taken), len(refused)) == (1, len(requests) - 1), results
        assert all("has gone stale" in r.message for r in refused)
        check(api)
        await api.store.close()

    asyncio.run(play())
