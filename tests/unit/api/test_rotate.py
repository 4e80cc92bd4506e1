"""Rotation of secrets and configs, and their earlier versions."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from manager.store import STACK_LABEL
from swarm import errors
from swarm.v1 import (
    Config,
    ConfigReference,
    Dependency,
    Driver,
    FileTarget,
    Kind,
    RotateRequest,
    RotateResponse,
    Secret,
    SecretReference,
    Service,
    ServiceRevision,
    Stack,
    StackSpec,
)
from tests.unit.api.harness import CONTEXT, Api, config, secret, service
from tests.unit.api.test_stacks import actions, app, finish, until


async def rotate(
    api: Api, ref: str, data: bytes, *, kind: Kind = Kind.SECRET, version: int = 0
) -> RotateResponse:
    request = RotateRequest(kind=kind, ref=ref, data=data, version=version)
    return await api.control.rotate(request, CONTEXT)


def using(name: str, *secrets: str, **fields: Any):
    references = tuple(
        SecretReference(
            secret_name=s, file=FileTarget(name=f"/etc/{s}", uid="9", gid="8", mode=0o440)
        )
        for s in secrets
    )
    return service(name, container={"secrets": references}, **fields)


def versions(api: Api) -> dict[str, int]:
    return {s.spec.name: s.task_version for s in api.all(Service)}


async def test_exactly_the_users_are_rolled_whoever_they_belong_to(api: Api):
    old = await api.create(secret=secret("key", labels={"a": "b"}))
    await api.create(secret=secret("other"))
    await api.create(service=using("alone", "key", "other"))
    await api.create(service=using("bystander", "other"))
    shop = (using("shop_a", "key"), using("shop_b", "other"))
    await api.deploy(StackSpec(name="shop", services=shop, external_secrets=("key", "other")))
    response = await rotate(api, "key", b"new")
    assert response.services == ("alone", "shop_a")
    assert response.service_ids == tuple(api.one(Service, n).id for n in response.services)
    assert response.revision == api.store.revision
    assert versions(api) == {"alone": 2, "shop_a": 2, "bystander": 1, "shop_b": 1}
    new = api.one(Secret, "key")
    assert (new.id, new.spec.labels) == (response.id, {"a": "b"})
    assert api.sealer.open(new.sealed) == b"new"
    reference = api.one(Service, "alone").spec.task.container.secrets[0]
    assert (reference.secret_id, reference.secret_name) == (new.id, "key")
    assert reference.file == FileTarget(name="/etc/key", uid="9", gid="8", mode=0o440)
    earlier = api.stored(Secret, old)
    assert (earlier.superseded, earlier.spec.name) == (True, f"key.{old[:8]}")


async def test_same_content_changes_nothing(api: Api):
    id_ = await api.create(secret=secret("key"))
    await api.create(service=using("web", "key"))
    before = api.store.revision
    response = await rotate(api, "key", b"s3cret")
    assert (response.id, response.services, api.store.revision) == (id_, (), before)


async def test_rollback_of_a_service_brings_the_old_content_back(api: Api):
    old = await api.create(secret=secret("key"))
    await api.create(service=using("web", "key"))
    before = api.one(Service, "web").spec
    await rotate(api, "key", b"new")
    await api.update(api.one(Service, "web"), rollback=True)
    assert api.one(Service, "web").spec == before, "the very spec of before"
    assert before.task.container.secrets[0].secret_id == old


async def test_config_is_rotated_with_its_templating(api: Api):
    await api.create(config=config(templating=Driver(name="golang")))
    reference = ConfigReference(config_name="conf")
    await api.create(service=service("web", container={"configs": (reference,)}))
    response = await rotate(api, "conf", b"x=2", kind=Kind.CONFIG)
    new = api.one(Config, "conf")
    assert (new.id, new.spec.data) == (response.id, b"x=2")
    assert new.spec.templating == Driver(name="golang")
    assert response.services == ("web",)
    assert api.one(Service, "web").spec.task.container.configs[0].config_id == new.id


async def test_services_being_removed_keep_the_old_content(api: Api):
    old = await api.create(secret=secret("key"))
    await api.create(service=using("web", "key"))
    await api.remove(Kind.SERVICE, "web")
    assert (await rotate(api, "key", b"new")).services == ()
    assert api.one(Service, "web").spec.task.container.secrets[0].secret_id == old


async def test_earlier_versions_go_when_nothing_refers_to_them(api: Api):
    old = await api.create(secret=secret("key"))
    unused = await api.create(config=config("unused"))
    await api.create(service=using("web", "key"))
    await rotate(api, "key", b"new")
    await rotate(api, "unused", b"new", kind=Kind.CONFIG)
    await until(api, lambda: api.stored(Config, unused) is None)
    assert api.stored(Secret, old) is not None, "the service can be rolled back to it"
    web = api.one(Service, "web")
    await api.drop(api.stored(ServiceRevision, f"{web.id}.1"))
    await until(api, lambda: api.stored(Secret, old) is None)
    assert api.names(Secret) == ["key"]


async def test_secret_of_a_stack_stays_the_stack_s(api: Api):
    await api.deploy(app())
    old = api.one(Secret, "app_key")
    response = await rotate(api, "app_key", b"new")
    assert response.services == ("app_web",)
    stack = api.one(Stack, "app")
    assert (stack.revision, stack.leftover_ids) == (1, (old.id,))
    assert api.one(Secret, "app_key").spec.labels[STACK_LABEL] == "app"
    again = await api.deploy(app(secrets=(secret("app_key", b"new"),)))
    assert set(actions(again).values()) == {"unchanged"}, "the file now says what was rotated"
    back = await api.deploy(app())
    assert actions(back)["app_key"] == "updated", "files are right, also against a rotation"
    await api.remove(Kind.STACK, "app")
    await finish(api, "app_web", "app_db")
    await until(api, lambda: not api.store.count(Stack))
    assert api.all(Secret) == []


async def test_services_that_follow_a_user_are_restarted(api: Api):
    await api.create(secret=secret("key"))
    await api.create(service=using("db", "key"))
    follow = Dependency(service="db", condition="service_started", required=True, restart=True)
    await api.create(service=service("web", depends_on=(follow,)))
    assert (await rotate(api, "key", b"new")).services == ("db", "web")
    assert versions(api) == {"db": 2, "web": 2}


# ---------------------------------------------------------------- refused


async def test_version_that_was_seen_is_checked(api: Api):
    id_ = await api.create(secret=secret("key"))
    at = api.stored(Secret, id_).meta.version
    with pytest.raises(
        errors.Conflict, match=f'rotation out of sequence: secret "key" is at version {at}'
    ):
        await rotate(api, "key", b"new", version=at + 1)
    await rotate(api, "key", b"new", version=at)


REFUSED: dict[str, tuple[dict[str, Any], type[errors.SwarmError], str]] = {
    "empty": ({"data": b""}, errors.Invalid, "a secret holds 1 to 512000 bytes, this one 0"),
    "too large": ({"data": b"x" * 512_001}, errors.Invalid, "this one 512001"),
    "another kind": ({"kind": Kind.NETWORK}, errors.Invalid, "only secrets and configs can be rotated, a network cannot"),
    "not there": ({"ref": "kei"}, errors.NotFound, "secret kei not found; did you mean 'key'?"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "error", "message"), REFUSED.values(), ids=REFUSED)
async def test_refused_rotation_changes_nothing(
    api: Api, fields: dict[str, Any], error: type[errors.SwarmError], message: str
):
    await api.create(secret=secret("key"))
    before = api.store.revision
    request = RotateRequest(**{"kind": Kind.SECRET, "ref": "key", "data": b"new", **fields})
    with pytest.raises(error) as caught:
        await api.control.rotate(request, CONTEXT)
    assert message in caught.value.message
    assert api.store.revision == before


async def test_what_goes_with_its_stack_is_not_rotated(api: Api):
    await api.deploy(app())
    await api.remove(Kind.STACK, "app")
    before = api.store.revision
    with pytest.raises(errors.Conflict, match='stack "app", whose it is, is being removed'):
        await rotate(api, "app_key", b"new")
    assert api.store.revision == before


# ---------------------------------------------------------------- earlier versions


@pytest.mark.parametrize("kind", [Kind.SECRET, Kind.CONFIG], ids=["secret", "config"])
async def test_earlier_versions_are_listed_on_demand_only(api: Api, kind: Kind):
    made: Any = secret("key") if kind == Kind.SECRET else config("key")
    spec: dict[str, Any] = {kind.name.lower(): made}
    old = await api.create(**spec)
    new = (await rotate(api, "key", b"new", kind=kind)).id

    async def listed(**filters: Any) -> list[str]:
        return [o.id for o in await api.list(kind, **filters)]

    assert await listed() == await listed(superseded="false") == await listed(name="key") == [new]
    assert await listed(superseded="true") == [old]
    assert sorted(await listed(superseded=("true", "false"))) == sorted([old, new])
    with pytest.raises(
        errors.Invalid, match="invalid superseded 'maybe'; accepted are true and false"
    ):
        await listed(superseded="maybe")
    got = await api.get(kind, old)
    assert getattr(got.object, kind.name.lower()).superseded


async def test_other_kinds_have_no_earlier_versions(api: Api):
    with pytest.raises(errors.Invalid, match="invalid filter 'superseded' for networks"):
        await api.list(Kind.NETWORK, superseded="true")


async def test_id_prefix_means_the_present_one(api: Api):
    await api.put(
        Secret(id="abc1", spec=secret("key.abc1", b""), superseded=True),
        Secret(id="abc2", spec=secret("key", b"")),
    )
    assert (await api.get(Kind.SECRET, "abc")).object.secret.id == "abc2"
    assert (await api.get(Kind.SECRET, "abc1")).object.secret.id == "abc1"


async def test_earlier_version_cannot_be_changed(api: Api):
    old = await api.create(secret=secret("key"))
    await rotate(api, "key", b"new")
    message = f"secret \"key.{old[:8]}\" .* is an earlier version and cannot be {{}}: .* the present one, 'key'"
    with pytest.raises(errors.Conflict, match=message.format("rotated")):
        await rotate(api, old, b"newer")
    earlier = api.stored(Secret, old)
    labelled = structs.replace(earlier.spec, labels={"a": "b"})
    with pytest.raises(errors.Conflict, match=message.format("updated")):
        await api.update(earlier, secret=labelled)


async def test_earlier_version_in_use_cannot_be_removed(api: Api):
    old = await api.create(secret=secret("key"))
    await api.create(service=using("web", "key"))
    await rotate(api, "key", b"new")
    await api.update(api.one(Service, "web"), rollback=True)
    with pytest.raises(errors.Conflict, match='is in use by service "web"'):
        await api.remove(Kind.SECRET, old)


async def test_stack_cannot_take_the_name_of_an_earlier_version(api: Api):
    await api.deploy(app())
    old = api.one(Secret, "app_key").id
    await rotate(api, "app_key", b"new")
    with pytest.raises(errors.Invalid, match="an earlier version of 'app_key' is kept under"):
        await api.deploy(
            app(secrets=(secret("app_key", b"new"), secret(f"app_key.{old[:8]}", b"mine")))
        )
