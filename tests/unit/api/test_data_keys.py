"""What the API shows and does while secrets are sealed anew: nothing of it."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest
from msgspec import structs

from manager.ca import DataKeys, objects
from manager.store import sealed
from swarm import errors
from swarm.v1 import (
    Cluster,
    DeployStackRequest,
    GetStackHistoryRequest,
    Kind,
    NodeDescription,
    Resources,
    RotateRequest,
    Secret,
    SecretReference,
    Service,
    ServiceRevision,
    StackSpec,
    Task,
    WatchRequest,
)
from tests.unit.api.harness import CONTEXT, Api, changed, node, secret, service, task

AUTH = base64.urlsafe_b64encode(b'{"username":"u","password":"p"}').decode()
SPEC = StackSpec(
    name="app",
    services=(
        service("app_web", container={"secrets": (SecretReference(secret_name="app_key"),)}),
    ),
    secrets=(secret("app_key", b"hush"),),
)


@pytest.fixture
async def shop(api: Api) -> Api:
    """A stack with a secret and credentials runs; all of it sealed with the first data key."""
    description = NodeDescription(
        hostname="h1",
        runtimes=("docker",),
        resources=Resources(cpu_nano=4_000_000_000, memory_bytes=8 << 30),
    )
    await api.put(changed(node("n1"), description=description))
    await DataKeys(api.store, api.clock, api.sealer).settle()
    await api.deploy(SPEC, auth=AUTH)
    await api.put(task("t1", api.one(Service, "app_web")))
    return api


def used(api: Api) -> set[int]:
    return {i for c in sealed.CLASSES for i in sealed.key_ids(api.store.all(c))}


async def replace_key(api: Api) -> None:
    """As `swarm update --rotate-data-key`, and until all is done."""
    cluster = api.all(Cluster)[0]
    spec = structs.replace(
        cluster.spec, data_key_force_rotate=cluster.spec.data_key_force_rotate + 1
    )
    await api.update(cluster, cluster=spec)
    api.clock.advance(seconds=60)
    await DataKeys(api.store, api.clock, api.sealer).settle()


async def test_who_asks_for_another_key_gets_it_and_everything_is_sealed_with_it(shop: Api) -> None:
    assert used(shop) == {1}
    await replace_key(shop)
    assert [k.id for k in objects(shop.store)[1].data_keys] == [2]
    assert used(shop) == {2}
    assert shop.sealer.open(shop.one(Secret, "app_key").sealed) == b"hush"


async def test_no_task_and_no_service_changes(shop: Api) -> None:
    before = (shop.all(Task), shop.all(Service))
    await replace_key(shop)
    assert (shop.all(Task), shop.all(Service)) == before


async def test_the_same_deploy_changes_nothing_afterwards(shop: Api) -> None:
    await replace_key(shop)
    service_version = shop.one(Service, "app_web").meta.version
    done = await shop.deploy(SPEC, auth=AUTH)
    assert {c.action for c in done.changes} == {"unchanged"}
    assert shop.one(Service, "app_web").meta.version == service_version


async def test_plans_hold(shop: Api) -> None:
    changes = DeployStackRequest(spec=structs.replace(SPEC, services=()))
    said = await shop.control.plan_stack(changes, CONTEXT)
    await replace_key(shop)
    assert await shop.control.plan_stack(changes, CONTEXT) == said
    asked = structs.replace(changes, expected_version=said.version)
    await shop.control.deploy_stack(asked, CONTEXT)


async def test_what_is_shown_stays_as_it_was(shop: Api) -> None:
    before = await shop.list(Kind.SECRET)
    asked = GetStackHistoryRequest(stack="app")
    history = await shop.control.get_stack_history(asked, CONTEXT)
    await replace_key(shop)
    await replace_key(shop)
    assert await shop.list(Kind.SECRET) == before
    assert await shop.control.get_stack_history(asked, CONTEXT) == history


async def test_changes_that_are_based_on_what_was_shown_before_are_taken(shop: Api) -> None:
    await shop.create(secret=secret("mine"))
    shown = (await shop.get(Kind.SECRET, "mine")).object.secret
    await replace_key(shop)
    await shop.update(shown, secret=secret("mine", b"", labels={"a": "b"}))
    after = (await shop.get(Kind.SECRET, "mine")).object.secret
    assert after.meta.version > shown.meta.version
    assert after.meta.updated_at_ns > shown.meta.updated_at_ns
    with pytest.raises(errors.Conflict, match="out of sequence"):
        await shop.update(shown, secret=secret("mine", b"", labels={"a": "c"}))
    await replace_key(shop)
    rotation = RotateRequest(kind=Kind.SECRET, ref="mine", data=b"new", version=after.meta.version)
    await shop.control.rotate(rotation, CONTEXT)


async def test_watches_are_told_nothing(shop: Api) -> None:
    kinds = (Kind.SECRET, Kind.SERVICE, Kind.TASK, Kind.CONFIG)
    stream = shop.control.watch(WatchRequest(kinds=kinds), CONTEXT)
    assert (await anext(stream)).events == ()
    await replace_key(shop)
    await shop.create(secret=secret("last"))
    async with asyncio.timeout(5):
        told: list[Any] = []
        while not told:
            told += (await anext(stream)).events
    assert [e.object.secret.spec.name for e in told] == ["last"]


async def test_credentials_follow_copies_of_a_spec(shop: Api) -> None:
    """A rollback copies what an earlier version was pulled with."""
    web = shop.one(Service, "app_web")
    await shop.update(web, service=structs.replace(web.spec, labels={"a": "b"}))
    await replace_key(shop)
    await shop.update(shop.one(Service, "app_web"), rollback=True)
    await replace_key(shop)
    newest = max(shop.all(ServiceRevision), key=lambda r: r.spec_version)
    assert shop.sealer.open(newest.sealed_registry_auth).decode() == AUTH
    assert used(shop) == {3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_key_lifetime_ns": 10**9}, "data keys live for at least 1h"),
        ({"data_key_lifetime_ns": -1}, "data keys live for at least 1h"),
        ({"data_key_force_rotate": 0}, "counted up only"),
    ],
)
async def test_settings_that_cannot_be(shop: Api, changes: dict[str, int], message: str) -> None:
    await replace_key(shop)
    cluster = shop.all(Cluster)[0]
    with pytest.raises(errors.Invalid, match=message):
        await shop.update(cluster, cluster=structs.replace(cluster.spec, **changes))
