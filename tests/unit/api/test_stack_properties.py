"""Whatever is deployed, removed, rolled back and finished in whatever order: what must always hold."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from manager.api.leftovers import finish as finish_stacks
from manager.api.references import ids_used
from manager.store import STACK_LABEL
from swarm import errors
from swarm.v1 import (
    Config,
    ConfigReference,
    Kind,
    Network,
    NetworkAttachmentSpec,
    Secret,
    SecretReference,
    Service,
    ServiceRevision,
    Stack,
    StackSpec,
)
from tests.unit.api.harness import Api, config, network, port, secret, service

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


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("deploy"), specs(), st.booleans()),
        st.tuples(st.just("remove"), st.sampled_from(STACKS)),
        st.tuples(st.just("rollback"), st.integers(0, 5)),
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
        case ("finish", revisions):
            await finish(api, revisions=revisions)


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
        for cls in (Stack, Service, Network, Secret, Config):
            assert api.all(cls) == []
        await api.store.close()

    asyncio.run(play())
