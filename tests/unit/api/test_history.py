"""Histories of stacks: what is kept, for how long, and how one goes back."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from msgspec import structs

from manager.api.history import HISTORY_MAX
from manager.api.plan_version import plan_version
from manager.api.stack_request import resolve_request
from manager.api.stacks import deploy_request
from manager.store.engine import Stale
from swarm import errors
from swarm.rpc import Context, Identity
from swarm.v1 import (
    Caller,
    Config,
    DeployStackRequest,
    DeployStackResponse,
    GetStackHistoryRequest,
    Kind,
    Network,
    Secret,
    SecretReference,
    Service,
    ServiceRevision,
    Stack,
    StackRevision,
    StackRollback,
    StackSpec,
    UpdateState,
    UpdateStatus,
)
from tests.unit.api.harness import CONTEXT, Api, config, network, secret, service
from tests.unit.api.test_stacks import actions, app, everything, finish, until


async def back(
    api: Api, revision: int = 0, *, stack: str = "app", **fields: Any
) -> DeployStackResponse:
    request = DeployStackRequest(rollback=StackRollback(stack=stack, revision=revision), **fields)
    return await api.control.deploy_stack(request, CONTEXT)


async def revisions(api: Api, stack: str = "app") -> list[StackRevision]:
    response = await api.control.get_stack_history(GetStackHistoryRequest(stack=stack), CONTEXT)
    return list(response.revisions)


def with_image(image: str, **fields: Any) -> StackSpec:
    return app(services=(service("app_db", container={"image": image}),), **fields)


def image(api: Api, name: str = "app_db") -> str:
    return str(api.one(Service, name).spec.task.container.image)


def key_used(api: Api) -> bytes:
    """The content of the secret that app_web refers to."""
    reference = api.one(Service, "app_web").spec.task.container.secrets[0]
    return api.sealer.open(api.stored(Secret, reference.secret_id).sealed)


# ---------------------------------------------------------------- what is kept


async def test_each_deploy_that_changes_something_is_noted(api: Api):
    first = await api.deploy(app())
    await api.deploy(app())
    await api.deploy(app(secrets=(secret("app_key", b"other"),)), prune=True)
    second, noted = await revisions(api)
    assert (second.revision, noted.revision) == (2, 1)
    assert noted.id == f"{first.stack_id}.1"
    assert (noted.who, noted.prune, noted.rollback_to) == ("admin ada", False, 0)
    assert {c.name: c.action for c in noted.changes} == actions(first)
    assert {c.name: c.action for c in second.changes} == {
        "app_key": "updated",
        "app_web": "updated",
    }
    assert second.prune
    assert noted.secret_ids["app_key"] != second.secret_ids["app_key"]
    assert second.secret_ids == {"app_key": api.one(Secret, "app_key").id}
    assert second.config_ids == noted.config_ids == {"app_conf": api.one(Config, "app_conf").id}


async def test_who_deployed_is_noted_as_in_the_log(api: Api):
    context = Context(Identity(Caller.LOCAL), "unix:")
    await api.control.deploy_stack(DeployStackRequest(spec=app()), context)
    assert (await revisions(api))[0].who == "local"


async def test_history_holds_no_content_and_no_credentials(api: Api):
    await api.deploy(app(), auth=auth("a.example"))
    stored = api.all(StackRevision)[0]
    assert {s.data for s in stored.spec.secrets} == {b""}
    assert {c.data for c in stored.spec.configs} == {b""}
    assert set(stored.sealed_registry_auths) == {"app_web", "app_db"}
    assert (await revisions(api))[0].sealed_registry_auths == {}


async def test_deploys_beyond_the_limit_are_forgotten_with_what_only_they_referred_to(api: Api):
    for i in range(HISTORY_MAX + 2):
        await api.deploy(StackSpec(name="app", secrets=(secret("app_key", b"%d" % i),)))
    kept = [r.revision for r in await revisions(api)]
    assert kept == list(range(HISTORY_MAX + 2, 2, -1))
    await until(api, lambda: api.store.count(Secret) == HISTORY_MAX)
    held = {api.sealer.open(s.sealed) for s in api.all(Secret)}
    assert held == {b"%d" % i for i in range(2, HISTORY_MAX + 2)}
    assert len(await api.list(Kind.SECRET)) == 1


async def test_store_revision_is_that_of_the_commit(api: Api):
    response = await api.deploy(app())
    assert response.store_revision == api.store.revision
    assert api.one(Stack, "app").meta.version == response.store_revision


async def test_history_goes_with_the_stack(api: Api):
    await api.deploy(app())
    await api.deploy(app(secrets=(secret("app_key", b"2"),)))
    await api.remove(Kind.STACK, "app")
    assert await revisions(api) == []
    with pytest.raises(errors.Conflict, match="is being removed, and its history with it"):
        await back(api)
    await finish(api, "app_web", "app_db")
    await until(api, lambda: not api.store.count(Stack))
    assert api.all(Secret) == api.all(Config) == api.all(StackRevision) == []


async def test_stack_from_before_histories_gets_one_with_its_next_deploy(api: Api):
    await api.deploy(app(), auth=auth("a.example"))
    await api.drop(*api.all(StackRevision))
    assert [r.revision for r in await revisions(api)] == [1], "the present is known at any time"
    before = api.store.revision
    await api.deploy(app(secrets=(secret("app_key", b"other"),)))
    assert api.store.revision == before + 1
    assert [r.revision for r in await revisions(api)] == [2, 1]
    await back(api)
    assert key_used(api) == b"s3cret"


# ---------------------------------------------------------------- going back


async def test_rollback_brings_the_earlier_spec_back_as_a_new_revision(api: Api):
    await api.deploy(with_image("i:1"))
    await api.deploy(with_image("i:2"))
    response = await back(api)
    assert image(api) == "i:1"
    assert response.revision == 3
    newest = (await revisions(api))[0]
    assert (newest.revision, newest.rollback_to, newest.prune) == (3, 1, True)
    assert api.one(Stack, "app").spec.services[0].task.container.image == "i:1"


async def test_a_paused_roll_out_taken_up_again_is_no_revision(api: Api):
    """Else a rollback would go from the failed spec to the failed spec."""
    await api.deploy(with_image("i:1"))
    await api.deploy(with_image("broken"))
    db = api.one(Service, "app_db")
    await api.put(structs.replace(db, update_status=UpdateStatus(state=UpdateState.PAUSED)))
    response = await api.deploy(with_image("broken"))
    assert actions(response)["app_db"] == "updated"
    assert api.one(Service, "app_db").update_status is None
    assert response.revision == 2
    await back(api)
    assert image(api) == "i:1"


async def test_rollback_of_a_rollback_undoes_it(api: Api):
    await api.deploy(with_image("i:1"))
    await api.deploy(with_image("i:2"))
    await back(api)
    await back(api)
    assert image(api) == "i:2"
    assert [r.rollback_to for r in await revisions(api)] == [2, 1, 0, 0]
    await back(api, 1)
    assert image(api) == "i:1"


async def test_rollback_brings_the_content_of_secrets_and_configs_back(api: Api):
    await api.deploy(app())
    await api.deploy(app(secrets=(secret("app_key", b"2"),), configs=(config("app_conf", b"2"),)))
    await api.deploy(app(secrets=(secret("app_key", b"3"),), configs=(config("app_conf", b"3"),)))
    db = api.one(Service, "app_db")
    for number, content in ((1, b"s3cret"), (2, b"2"), (3, b"3"), (1, b"s3cret")):
        response = await back(api, number)
        assert key_used(api) == content
        assert actions(response)["app_db"] == "unchanged"
        assert [s.spec.name for s in await api.list(Kind.SECRET)] == ["app_key"]
    assert api.one(Config, "app_conf").spec.data == b"x=1"
    assert api.one(Service, "app_db") == db


async def test_rollback_removes_what_was_not_there_then(api: Api):
    await api.deploy(app())
    extra = app(
        services=(*app().services, service("app_new")),
        networks=(*app().networks, network("app_new")),
        secrets=(*app().secrets, secret("app_new")),
    )
    await api.deploy(extra)
    response = await back(api)
    assert {k.name for k in response.changes if k.action == "removed"} == {"app_new"}
    assert api.one(Service, "app_new").pending_delete
    assert [n.spec.name for n in await api.list(Kind.SECRET)] == ["app_key"]
    await finish(api, "app_new")
    await back(api)
    new = api.one(Service, "app_new")
    assert not new.pending_delete
    assert "app_new" in api.names(Network)
    assert api.sealer.open(api.one(Secret, "app_new").sealed) == b"s3cret"


async def test_rollback_to_what_is_there_changes_nothing(api: Api):
    await api.deploy(app())
    before = api.store.revision
    response = await back(api, 1)
    assert set(actions(response).values()) == {"unchanged"}
    assert (response.revision, api.store.revision) == (1, before)


def auth(registry: str) -> str:
    return base64.b64encode(json.dumps({"serveraddress": registry}).encode()).decode()


async def test_rollback_uses_the_credentials_of_then(api: Api):
    def used() -> bytes:
        db = api.one(Service, "app_db")
        revision = api.stored(ServiceRevision, f"{db.id}.{db.spec_version}")
        return api.sealer.open(revision.sealed_registry_auth)

    await api.deploy(with_image("a.example/i"), auth=auth("a.example"))
    await api.deploy(with_image("b.example/i"), auth=auth("b.example"))
    await back(api)
    assert used() == auth("a.example").encode()
    await back(api)
    assert used() == auth("b.example").encode()
    await back(api, 1, registry_auths={"app_db": auth("new.example")})
    assert used() == auth("new.example").encode()
    await back(api, 2, registry_auth=auth("newer.example"))
    assert used() == auth("newer.example").encode()


async def test_secret_rolled_back_to_and_removed_by_hand_is_named(api: Api):
    await api.deploy(
        StackSpec(name="app", secrets=(secret("app_key"),), configs=(config("app_c"),))
    )
    old = api.one(Secret, "app_key")
    await api.deploy(
        StackSpec(name="app", secrets=(secret("app_key", b"2"),), configs=(config("app_c"),))
    )
    await api.remove(Kind.SECRET, old.id)
    before = api.store.revision
    with pytest.raises(errors.Conflict) as caught:
        await back(api)
    assert caught.value.message == (
        "stack \"app\" cannot go back to revision 1: the content that secret 'app_key' had then was "
        "removed; choose another revision, or deploy from files"
    )
    assert api.store.revision == before


# ---------------------------------------------------------------- refused


async def test_no_such_stack_names_the_nearest(api: Api):
    await api.deploy(StackSpec(name="shop", services=(service("shop_web"),)))
    with pytest.raises(errors.NotFound, match=r"stack shopp not found; did you mean 'shop'\?"):
        await back(api, stack="shopp")
    with pytest.raises(errors.NotFound, match=r"did you mean 'shop'\?"):
        await revisions(api, "shoq")


async def test_nothing_before_the_present(api: Api):
    await api.deploy(app())
    with pytest.raises(
        errors.Conflict, match="no earlier revision to go back to: it was deployed once"
    ):
        await back(api)


async def test_no_such_revision_says_which_are_kept(api: Api):
    for i in range(HISTORY_MAX + 3):
        await api.deploy(with_image(f"i:{i}"))
    for number in (2, 99, -1):
        with pytest.raises(
            errors.NotFound, match=f"has no revision {number} to go back to; kept are 4 to 13"
        ):
            await back(api, number)


@pytest.mark.parametrize(
    ("request_", "has"),
    [
        (DeployStackRequest(), "neither"),
        (DeployStackRequest(spec=app(), rollback=StackRollback(stack="app")), "both"),
    ],
    ids=["neither", "both"],
)
async def test_spec_and_rollback_exclude_each_other(
    api: Api, request_: DeployStackRequest, has: str
):
    with pytest.raises(
        errors.Invalid, match=f"either the stack's spec or the revision .* has {has}"
    ):
        await api.control.deploy_stack(request_, CONTEXT)


async def test_refused_rollback_leaves_everything(api: Api):
    await api.deploy(app())
    await api.deploy(StackSpec(name="app"), prune=True)
    await finish(api, "app_web", "app_db")
    await until(api, lambda: not api.names(Network))
    # Its name is taken by now, by somebody else.
    await api.create(service=service("app_db"))
    before = everything(api)
    with pytest.raises(errors.Invalid, match="'app_db' exists already and was not made by a stack"):
        await back(api)
    assert everything(api) == before


# ---------------------------------------------------------------- the version of a plan


def version(api: Api, request: DeployStackRequest) -> str:
    wanted = resolve_request(api.store, request, sealer=api.sealer)
    return plan_version(api.store, wanted, sealer=api.sealer)


def asked(spec: StackSpec, **fields: Any) -> DeployStackRequest:
    return DeployStackRequest(spec=spec, **fields)


async def deploy(api: Api, request: DeployStackRequest, expected: str) -> DeployStackResponse:
    return await api.control.deploy_stack(
        structs.replace(request, expected_version=expected), CONTEXT
    )


async def test_plan_that_still_holds_is_deployed(api: Api):
    request = asked(app())
    await deploy(api, request, version(api, request))
    changed = asked(app(secrets=(secret("app_key", b"2"),)), prune=True)
    planned = version(api, changed)
    web = api.one(Service, "app_web")
    # What the control loop writes and credentials are no part of a plan.
    await api.put(structs.replace(web, job_iteration=0, meta=web.meta))
    assert version(api, structs.replace(changed, registry_auth=auth("x.example"))) == planned
    await deploy(api, changed, planned)
    rollback = DeployStackRequest(rollback=StackRollback(stack="app"))
    await deploy(api, rollback, version(api, rollback))
    assert key_used(api) == b"s3cret"


async def test_stale_plan_says_what_changed(api: Api):
    request = asked(app())
    planned = version(api, request)
    await api.deploy(app())
    with pytest.raises(
        errors.Conflict,
        match='has gone stale: it is at revision 1 now, it was new; changed since: service "app_db"',
    ):
        await deploy(api, request, planned)
    planned = version(api, request)
    db = api.one(Service, "app_db")
    await api.update(db, service=structs.replace(db.spec, labels={**db.spec.labels, "a": "b"}))
    with pytest.raises(errors.Conflict) as caught:
        await deploy(api, request, planned)
    assert caught.value.message == (
        'the plan for stack "app" has gone stale: changed since: service "app_db". Make a new plan '
        "with --dry-run, look at it, and deploy that one"
    )
    assert api.one(Service, "app_db").spec.labels["a"] == "b"


@pytest.mark.parametrize(
    "other",
    [
        asked(app(services=(service("app_db"),))),
        asked(app(secrets=(secret("app_key", b"2"),))),
        asked(app(), prune=True),
    ],
    ids=["services", "content", "prune"],
)
async def test_plan_of_something_else_is_refused(api: Api, other: DeployStackRequest):
    planned = version(api, asked(app()))
    with pytest.raises(errors.Conflict, match="what is asked for is not what was planned"):
        await deploy(api, other, planned)
    assert not api.all(Stack)


async def test_plan_is_guarded_against_other_managers_up_to_the_commit(api: Api):
    """Also where what changes is not what the deploy writes."""
    await api.deploy(app())
    request = asked(app(secrets=(secret("app_key", b"2"),)))
    request = structs.replace(request, expected_version=version(api, request))
    draft = api.store.draft()
    deploy_request(draft, request, who="", new_id=iter("abcdefgh").__next__, sealer=api.sealer)
    db = api.one(Service, "app_db")
    await api.update(db, service=structs.replace(db.spec, labels={**db.spec.labels, "a": "b"}))
    with pytest.raises(Stale):
        await api.store.commit(draft)


async def test_external_object_that_changed_makes_a_plan_stale(api: Api):
    await api.create(secret=secret("tls"))
    reference = (SecretReference(secret_name="tls"),)
    request = asked(
        StackSpec(
            name="app",
            services=(service("app_web", container={"secrets": reference}),),
            external_secrets=("tls",),
        )
    )
    planned = version(api, request)
    await api.remove(Kind.SECRET, "tls")
    await api.create(secret=secret("tls", b"2"))
    with pytest.raises(errors.Conflict, match='changed since: secret "tls"'):
        await deploy(api, request, planned)


async def test_roll_out_that_was_paused_makes_a_plan_stale(api: Api):
    await api.deploy(app())
    request = asked(app())
    planned = version(api, request)
    paused = UpdateStatus(state=UpdateState.PAUSED)
    await api.put(structs.replace(api.one(Service, "app_db"), update_status=paused))
    with pytest.raises(errors.Conflict, match="has gone stale: something that it uses"):
        await deploy(api, request, planned)


async def test_steps_of_a_roll_out_make_no_plan_stale(api: Api):
    await api.deploy(app())
    planned = version(api, asked(app()))
    updating = UpdateStatus(state=UpdateState.UPDATING)
    await api.put(structs.replace(api.one(Service, "app_db"), update_status=updating))
    assert version(api, asked(app())) == planned


async def test_service_on_its_way_out_makes_a_plan_stale(api: Api):
    await api.deploy(app())
    request = asked(app())
    planned = version(api, request)
    await api.remove(Kind.SERVICE, "app_db")
    with pytest.raises(errors.Conflict, match="has gone stale: something that it uses"):
        await deploy(api, request, planned)


async def test_other_stacks_and_cleaning_up_make_no_plan_stale(api: Api):
    await api.deploy(app())
    await api.deploy(StackSpec(name="app"), prune=True)
    request = asked(StackSpec(name="app", services=(service("app_new"),)))
    planned = version(api, request)
    await finish(api, "app_web", "app_db")
    await until(api, lambda: not api.names(Network))
    await api.deploy(StackSpec(name="other", services=(service("other_a"),)))
    assert version(api, request) == planned


async def test_what_is_no_version_is_refused_as_such(api: Api):
    with pytest.raises(errors.Invalid, match="'yesterday' is not the version of a plan"):
        await deploy(api, asked(app()), "yesterday")


async def test_version_tells_nothing_about_secrets_without_the_key(api: Api):
    other = Api()
    other.sealer = type(other.sealer)(b"x" * 32)
    assert version(api, asked(app())) != version(other, asked(app()))
