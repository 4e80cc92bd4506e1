"""Stacks: all of it or nothing; what changed, what did not, what goes."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest
from msgspec import structs

from manager.store import STACK_LABEL
from swarm import errors
from swarm.v1 import (
    Config,
    ConfigReference,
    Dependency,
    DeployStackRequest,
    Driver,
    Global,
    Kind,
    Network,
    NetworkAttachmentSpec,
    Secret,
    SecretReference,
    Service,
    ServiceMode,
    ServiceRevision,
    Stack,
    StackRevision,
    StackSpec,
    Task,
    UpdateState,
    UpdateStatus,
    Volume,
    VolumeSpec,
)
from tests.unit.api.harness import CONTEXT, Api, config, network, port, secret, service, task


def app(**fields) -> StackSpec:
    """A stack with one of each."""
    full = {
        "name": "app",
        "services": (
            service(
                "app_web",
                container={
                    "image": "nginx:1",
                    "secrets": (SecretReference(secret_name="app_key"),),
                    "configs": (ConfigReference(config_name="app_conf"),),
                },
                task={"networks": (NetworkAttachmentSpec(target="app_net", aliases=("web",)),)},
                ports=[port(8080)],
            ),
            service("app_db"),
        ),
        "networks": (network("app_net"),),
        "secrets": (secret("app_key"),),
        "configs": (config("app_conf"),),
        "volumes": (VolumeSpec(name="app_data"),),
    }
    return StackSpec(**{**full, **fields})


def actions(response) -> dict[str, str]:
    return {c.name: c.action for c in response.changes}


def everything(api: Api) -> list[Any]:
    return [o for cls in (Service, Network, Secret, Stack) for o in api.all(cls)]


async def finish(api: Api, *services: str) -> None:
    """What the control loop does for services on their way out, then the clean-up of stacks."""
    for name in services:
        gone = api.one(Service, name)
        revisions = api.store.by(ServiceRevision, "service", gone.id)
        await api.drop(gone, *revisions, *api.store.by(Task, "service", gone.id))


async def until(api: Api, condition) -> None:
    """Runs the API's background work until the condition holds."""
    running = asyncio.create_task(api.control.run())
    try:
        async with asyncio.timeout(5):
            with api.store.watch(("all",)) as watch:
                while not condition():
                    await anext(watch)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_first_deploy_creates_everything(api: Api):
    response = await api.deploy(app())
    assert actions(response) == dict.fromkeys(
        ("app_net", "app_key", "app_conf", "app_data", "app_web", "app_db"), "created"
    )
    stack = api.one(Stack, "app")
    assert (stack.id, stack.revision) == (response.stack_id, response.revision) == (stack.id, 1)
    web = api.one(Service, "app_web")
    assert web.stack_id == stack.id
    assert web.spec.labels[STACK_LABEL] == "app"
    assert web.spec.task.networks[0].target == api.one(Network, "app_net").id
    assert web.spec.task.container.secrets[0].secret_id == api.one(Secret, "app_key").id


async def test_stack_keeps_no_data(api: Api):
    await api.deploy(app())
    spec = api.one(Stack, "app").spec
    assert spec.secrets[0].data == b""
    assert spec.configs[0].data == b""


async def test_second_deploy_of_the_same_changes_nothing(api: Api):
    first = await api.deploy(app())
    before = api.store.revision
    response = await api.deploy(app())
    assert set(actions(response).values()) == {"unchanged"}
    assert api.store.revision == before
    assert response.revision == first.revision


async def test_changed_service_alone_is_updated(api: Api):
    await api.deploy(app())
    response = await api.deploy(app(services=(app().services[0], service("app_db", replicas=3))))
    found = actions(response)
    assert found.pop("app_db") == "updated"
    assert set(found.values()) == {"unchanged"}
    assert response.revision == 2
    # Who waits for the change tells by it that somebody else has made the next one.
    assert {c.name: c.spec_version for c in response.changes if c.spec_version} == {"app_db": 2}


async def test_force_update_counted_up_by_hand_stays(api: Api):
    await api.deploy(app())
    db = api.one(Service, "app_db")
    forced = structs.replace(db.spec, task=structs.replace(db.spec.task, force_update=4))
    await api.update(db, service=forced)
    assert actions(await api.deploy(app()))["app_db"] == "unchanged"


async def test_without_prune_what_is_not_named_stays(api: Api):
    await api.deploy(app())
    await api.deploy(app(services=(service("app_db"),), networks=(), secrets=(), configs=()))
    assert not api.one(Service, "app_web").pending_delete
    assert api.names(Network) == ["app_net"]


async def test_prune_removes_what_is_not_named(api: Api):
    await api.deploy(app())
    response = await api.deploy(
        app(services=(service("app_db"),), networks=(), secrets=(), configs=()), prune=True
    )
    assert actions(response) == {
        "app_db": "unchanged",
        "app_data": "unchanged",
        "app_web": "removed",
        "app_net": "removed",
        "app_key": "removed",
        "app_conf": "removed",
    }
    assert api.one(Service, "app_web").pending_delete
    assert api.names(Network) == ["app_net"], "still used by tasks that are stopping"
    await finish(api, "app_web")
    await until(api, lambda: not api.names(Network))
    assert await api.list(Kind.SECRET) == await api.list(Kind.CONFIG) == []
    assert len(api.one(Stack, "app").leftover_ids) == 2, (
        "what a rollback needs is kept out of sight"
    )


async def test_pruned_network_that_nothing_uses_goes_at_once(api: Api):
    await api.deploy(app(networks=(network("app_net"), network("app_spare"))))
    await api.deploy(app(), prune=True)
    assert api.names(Network) == ["app_net"]
    assert api.one(Stack, "app").leftover_ids == ()


async def test_renamed_service_takes_the_port_over(api: Api):
    await api.deploy(app(services=(service("app_web", ports=[port(8080)]),)))
    response = await api.deploy(app(services=(service("app_www", ports=[port(8080)]),)), prune=True)
    assert actions(response)["app_www"] == "created"


async def test_services_of_a_stack_can_swap_their_ports(api: Api):
    def swapped(a: int, b: int) -> StackSpec:
        return app(services=(service("app_a", ports=[port(a)]), service("app_b", ports=[port(b)])))

    await api.deploy(swapped(8080, 8081))
    await api.deploy(swapped(8081, 8080))
    found = {s.spec.name: s.endpoint.ports[0].published_port for s in api.all(Service)}
    assert found == {"app_a": 8081, "app_b": 8080}
    with pytest.raises(errors.Invalid, match='already in use by service "app_b"'):
        await api.deploy(swapped(8080, 8080))


async def test_port_the_cluster_chose_is_not_taken_by_a_newcomer(api: Api):
    await api.deploy(app(services=(service("app_b", ports=[port(0)]),)))
    await api.deploy(
        app(services=(service("app_a", ports=[port(0)]), service("app_b", ports=[port(0)])))
    )
    found = {s.spec.name: s.endpoint.ports[0].published_port for s in api.all(Service)}
    assert found == {"app_a": 30001, "app_b": 30000}


# ---------------------------------------------------------------- content


async def test_changed_secret_becomes_a_new_object_and_rolls_its_users(api: Api):
    await api.deploy(app())
    old = api.one(Secret, "app_key")
    before = {s.spec.name: s.task_version for s in api.all(Service)}
    response = await api.deploy(app(secrets=(secret("app_key", b"other"),)))
    assert {n: a for n, a in actions(response).items() if a != "unchanged"} == {
        "app_key": "updated",
        "app_web": "updated",
    }
    new = api.one(Secret, "app_key")
    assert new.id != old.id
    assert api.sealer.open(new.sealed) == b"other"
    web = api.one(Service, "app_web")
    assert web.task_version > before["app_web"]
    assert web.spec.task.container.secrets[0].secret_id == new.id
    assert api.one(Service, "app_db").task_version == before["app_db"]


async def test_rollback_goes_back_to_the_earlier_secret(api: Api):
    await api.deploy(app())
    old = api.one(Secret, "app_key")
    await api.deploy(app(secrets=(secret("app_key", b"other"),)))
    await api.update(api.one(Service, "app_web"), rollback=True)
    reference = api.one(Service, "app_web").spec.task.container.secrets[0]
    assert reference.secret_id == old.id
    assert api.sealer.open(api.stored(Secret, reference.secret_id).sealed) == b"s3cret"


async def test_earlier_secret_goes_when_no_spec_refers_to_it(api: Api):
    await api.deploy(app())
    old = api.one(Secret, "app_key")
    await api.deploy(app(secrets=(secret("app_key", b"other"),)))
    assert api.one(Stack, "app").leftover_ids == (old.id,)
    web = api.one(Service, "app_web")
    await api.drop(api.stored(StackRevision, f"{web.stack_id}.1"))
    await api.drop(api.stored(ServiceRevision, f"{web.id}.1"))
    await until(api, lambda: api.stored(Secret, old.id) is None)
    assert api.names(Secret) == ["app_key"]
    assert api.one(Stack, "app").leftover_ids == ()


async def test_changed_config_rolls_as_well(api: Api):
    await api.deploy(app())
    await api.deploy(app(configs=(config("app_conf", b"x=2"),)))
    new = api.one(Config, "app_conf")
    assert new.spec.data == b"x=2"
    web = api.one(Service, "app_web")
    assert web.spec.task.container.configs[0].config_id == new.id
    assert web.task_version == 2


async def test_labels_of_a_secret_change_in_place(api: Api):
    await api.deploy(app())
    old = api.one(Secret, "app_key")
    response = await api.deploy(app(secrets=(secret("app_key", labels={"a": "b"}),)))
    assert actions(response)["app_key"] == "updated"
    assert actions(response)["app_web"] == "unchanged"
    assert api.one(Secret, "app_key").id == old.id


async def test_long_secret_names_can_be_superseded(api: Api):
    name = "k" * 64
    await api.deploy(StackSpec(name="app", secrets=(secret(name),)))
    await api.deploy(StackSpec(name="app", secrets=(secret(name, b"2"),)))
    assert [len(n) for n in api.names(Secret)] == [64, 64]


# ---------------------------------------------------------------- refused, with nothing done

BAD = {
    "service": (app(services=(service("app_web", container={"image": ""}),)), "no image is given"),
    "name": (app(name="a.pp"), "is not a stack name"),
    "twice": (app(services=(service("app_a"), service("app_a"))), "services: 'app_a' is declared twice"),
    "external network": (
        app(external_networks=("proxy",)),
        "network 'proxy' is declared as external, but could not be found",
    ),
    "external secret": (app(external_secrets=("tls",)), "secret 'tls' is declared as external"),
    "external config": (app(external_configs=("c",)), "config 'c' is declared as external"),
    "empty secret": (app(secrets=(secret("app_key", b""),)), "a secret holds 1 to 512000 bytes, this one 0"),
    "large config": (app(configs=(config("app_conf", b"x" * 1_024_001),)), "up to 1024000 bytes, this one 1024001"),
    "network driver": (
        app(networks=(network("app_net", driver=Driver(name="macvlan")),)),
        "driver: 'macvlan' is not one of overlay, bridge",
    ),
    "circle": (
        app(
            services=(
                service("app_a", depends_on=(Dependency(service="app_b", condition="service_started", required=True),)),
                service("app_b", depends_on=(Dependency(service="app_a", condition="service_started", required=True),)),
            )
        ),
        "services wait for each other: app_a -> app_b -> app_a",
    ),
    "port twice": (
        app(services=(service("app_a", ports=[port(80)]), service("app_b", ports=[port(80)]))),
        'port 80/tcp is already in use by service "app_a"',
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "message"), BAD.values(), ids=BAD)
async def test_one_problem_stops_all_of_it(api: Api, spec: StackSpec, message: str):
    before = api.store.revision
    with pytest.raises(errors.Invalid) as caught:
        await api.deploy(spec)
    assert message in caught.value.message
    assert api.store.revision == before
    assert list(api.all(Network)) == []


async def test_all_problems_of_all_objects_are_told(api: Api):
    spec = app(
        services=(
            service("app_a", container={"image": ""}),
            service("app_b", container={"secrets": (SecretReference(secret_name="gone"),)}),
        ),
        secrets=(secret("app_key", b""),),
        external_networks=("proxy",),
    )
    with pytest.raises(errors.Invalid) as caught:
        await api.deploy(spec)
    assert caught.value.message.startswith("4 problems:")
    for part in ('service "app_a"', 'service "app_b"', 'secret "app_key"', 'stack "app"'):
        assert part in caught.value.message


async def test_what_is_missing_is_told_once_and_not_by_each_user(api: Api):
    users = tuple(
        service(
            name,
            container={
                "secrets": (
                    SecretReference(secret_name="tls"),
                    SecretReference(secret_name="app_key"),
                ),
                "configs": (ConfigReference(config_name="conf"),),
            },
            task={"networks": (NetworkAttachmentSpec(target="proxy"),)},
        )
        for name in ("app_a", "app_b")
    )
    await api.create(secret=secret("tls2"))
    spec = StackSpec(
        name="app",
        services=users,
        secrets=(secret("app_key", b""),),
        external_secrets=("tls",),
        external_configs=("conf",),
        external_networks=("proxy",),
    )
    with pytest.raises(errors.Invalid) as caught:
        await api.deploy(spec)
    assert caught.value.message.splitlines() == [
        "4 problems:",
        "  stack \"app\": networks: network 'proxy' is declared as external, but could not be found; "
        "create it before the stack is deployed (`swarmctl network create`)",
        "  stack \"app\": secrets: secret 'tls' is declared as external, but could not be found; create "
        "it before the stack is deployed (`swarmctl secret create`); did you mean 'tls2'?",
        "  stack \"app\": configs: config 'conf' is declared as external, but could not be found; create "
        "it before the stack is deployed (`swarmctl config create`)",
        '  secret "app_key": data: a secret holds 1 to 512000 bytes, this one 0',
    ]


async def test_what_is_not_found_is_named_with_the_nearest(api: Api):
    await api.create(secret=secret("password"))
    bad = service(
        "app_web",
        container={"secrets": (SecretReference(secret_name="pasword"),)},
        depends_on=(Dependency(service="app_dv", condition="service_started", required=True),),
    )
    with pytest.raises(errors.Invalid) as caught:
        await api.deploy(StackSpec(name="app", services=(bad, service("app_db"))))
    assert (
        "secret 'pasword' not found; create it first; did you mean 'password'?"
        in caught.value.message
    )
    assert "service 'app_dv' not found; did you mean 'app_db'?" in caught.value.message
    await api.create(service=service("frontend"))
    with pytest.raises(
        errors.NotFound, match=r"service fronted not found; did you mean 'frontend'\?"
    ):
        await api.get(Kind.SERVICE, "fronted")


async def test_deploy_after_a_failed_update_was_rolled_back(api: Api):
    """What the control loop leaves: the earlier spec as the newest version, and no previous one."""
    good, bad = service("app_web"), service("app_web", container={"image": "broken"})
    await api.deploy(StackSpec(name="app", services=(good,)))
    first = api.one(Service, "app_web").spec
    await api.deploy(StackSpec(name="app", services=(bad,)))
    web = api.one(Service, "app_web")
    back = structs.replace(
        web,
        spec=first,
        spec_version=3,
        task_version=3,
        previous_spec_version=0,
        update_status=UpdateStatus(state=UpdateState.ROLLBACK_COMPLETED),
    )
    revision = api.stored(ServiceRevision, f"{web.id}.1")
    await api.put(back, structs.replace(revision, id=f"{web.id}.3", spec_version=3, meta=None))
    tried_again = await api.deploy(StackSpec(name="app", services=(bad,)))
    assert actions(tried_again) == {"app_web": "updated"}
    assert api.one(Service, "app_web").update_status is None
    await api.put(structs.replace(back, meta=api.one(Service, "app_web").meta))
    given_up = await api.deploy(StackSpec(name="app", services=(good,)))
    assert actions(given_up) == {"app_web": "unchanged"}
    assert given_up.revision == tried_again.revision
    now = api.one(Service, "app_web")
    assert (now.spec_version, now.update_status) == (3, None), (
        "it is not rolled back, it is as asked"
    )


async def test_content_that_comes_back_is_the_object_that_has_it(api: Api):
    """So services that were rolled back to it are not rolled again."""
    await api.deploy(app())
    old = [api.one(Secret, "app_key").id, api.one(Config, "app_conf").id]
    other = app(secrets=(secret("app_key", b"2"),), configs=(config("app_conf", b"2"),))
    await api.deploy(other)
    web = api.one(Service, "app_web")
    await api.update(web, rollback=True)
    back = api.one(Service, "app_web")
    said = await api.control.plan_stack(DeployStackRequest(spec=app()), CONTEXT)
    response = await api.deploy(app())
    assert {n: a for n, a in actions(response).items() if a != "unchanged"} == {
        "app_key": "updated",
        "app_conf": "updated",
    }
    assert [api.one(Secret, "app_key").id, api.one(Config, "app_conf").id] == old
    assert api.one(Service, "app_web").spec_version == back.spec_version
    planned = {c.change.name: c for c in said.changes if c.change and c.change.action == "updated"}
    assert planned.keys() == {"app_key", "app_conf"}
    assert {c.effect for c in planned.values()} == {"replaced"}
    assert [(f.before, f.after) for f in planned["app_conf"].fields] == [('"2"', '"x=1"')]
    again = await api.deploy(app())
    assert set(actions(again).values()) == {"unchanged"}


async def test_failed_commit_of_an_update_leaves_the_earlier_stack(api: Api):
    await api.deploy(app())
    before = {o.id: o for o in everything(api)}
    api.engine.failing = errors.Unavailable("disk is full; free some space")
    with pytest.raises(errors.Unavailable):
        await api.deploy(app(services=(service("app_new"),)), prune=True)
    api.engine.failing = None
    after = {o.id: o for o in everything(api)}
    assert after == before


async def test_what_belongs_to_another_is_not_taken(api: Api):
    await api.create(service=service("app_web"))
    await api.deploy(StackSpec(name="other", networks=(network("app_net"),)))
    with pytest.raises(errors.Invalid) as caught:
        await api.deploy(app())
    assert "'app_web' exists already and was not made by a stack" in caught.value.message
    assert "'app_net' exists already and belongs to stack 'other'" in caught.value.message


async def test_changed_network_is_refused_with_what_differs(api: Api):
    await api.deploy(app())
    before = api.store.revision
    with pytest.raises(errors.Invalid, match="a network cannot be changed, and internal differ"):
        await api.deploy(app(networks=(network("app_net", internal=True),)))
    assert api.store.revision == before


async def test_changed_mode_is_told_with_all_other_problems(api: Api):
    await api.deploy(app())
    jobs = service("app_db", mode=ServiceMode(global_service=Global()))
    with pytest.raises(errors.Invalid) as caught:
        await api.deploy(app(services=(jobs, service("app_x", container={"image": ""}))))
    assert caught.value.message.startswith("2 problems:")
    assert (
        'service "app_db": mode: service mode change is not allowed (it is replicated, asked for is '
        "global); remove the service and create it again" in caught.value.message
    )


async def test_changed_volume_is_refused(api: Api):
    await api.deploy(app())
    with pytest.raises(errors.Invalid, match="a volume cannot be changed"):
        await api.deploy(app(volumes=(VolumeSpec(name="app_data", driver=Driver(name="nfs")),)))


async def test_existing_external_objects_are_used(api: Api):
    net = await api.create(network=network("proxy"))
    web = service("app_web", task={"networks": (NetworkAttachmentSpec(target="proxy"),)})
    await api.deploy(StackSpec(name="app", services=(web,), external_networks=("proxy",)))
    assert api.one(Service, "app_web").spec.task.networks[0].target == net


# ---------------------------------------------------------------- removal


async def test_removal_ends_with_nothing_left(api: Api):
    await api.deploy(app())
    await api.put(task("t1", api.one(Service, "app_web")))
    await api.remove(Kind.STACK, "app")
    assert all(s.pending_delete for s in api.all(Service))
    assert api.names(Network) == ["app_net"]
    await finish(api, "app_db")
    assert api.names(Stack) == ["app"]
    await finish(api, "app_web")
    await until(api, lambda: not api.store.count(Stack))
    for cls in (Service, Network, Secret, Config, Volume, Stack):
        assert api.store.count(cls) == 0, cls


async def test_removal_is_refused_while_others_use_its_network(api: Api):
    await api.deploy(app())
    other = service("other", task={"networks": (NetworkAttachmentSpec(target="app_net"),)})
    await api.create(service=other)
    before = api.store.revision
    with pytest.raises(errors.Conflict, match="network 'app_net' is in use by service \"other\""):
        await api.remove(Kind.STACK, "app")
    assert api.store.revision == before


async def test_deploy_waits_until_the_stack_is_gone(api: Api):
    await api.deploy(app())
    old = api.one(Stack, "app")
    await api.remove(Kind.STACK, "app")
    deploying = asyncio.create_task(api.deploy(app()))
    await finish(api, "app_web", "app_db")
    await until(api, lambda: api.stored(Stack, old.id) is None)
    response = await deploying
    assert response.revision == 1
    assert response.stack_id != old.id


async def test_deploy_does_not_wait_for_ever(hasty: Api):
    await hasty.deploy(app())
    await hasty.remove(Kind.STACK, "app")
    with pytest.raises(errors.Conflict, match='stack "app" is still being removed'):
        await hasty.deploy(app())


async def test_pruned_service_that_comes_back_waits_for_the_old_one(api: Api):
    await api.deploy(app())
    await api.deploy(app(services=(app().services[0],)), prune=True)
    deploying = asyncio.create_task(api.deploy(app()))
    await finish(api, "app_db")
    assert actions(await deploying)["app_db"] == "created"


async def test_pruned_network_that_comes_back_is_kept(api: Api):
    await api.deploy(app())
    net = api.one(Network, "app_net")
    without = service("app_web")
    await api.deploy(app(services=(without,), networks=()), prune=True)
    assert net.id in api.one(Stack, "app").leftover_ids
    await finish(api, "app_db")
    response = await api.deploy(app())
    assert actions(response)["app_net"] == "unchanged"
    assert net.id not in api.one(Stack, "app").leftover_ids


async def test_each_service_s_image_has_the_credentials_of_its_registry(api: Api):
    def auth(registry: str) -> str:
        return base64.b64encode(json.dumps({"serveraddress": registry}).encode()).decode()

    auths = {"app_web": auth("a.example"), "app_db": auth("b.example")}
    names = ("app_web", "app_db", "app_cache")
    spec = StackSpec(name="app", services=tuple(service(name) for name in names))
    await api.control.deploy_stack(
        DeployStackRequest(spec=spec, registry_auth=auth("c.example"), registry_auths=auths),
        CONTEXT,
    )
    wanted = auths | {"app_cache": auth("c.example")}
    for name in names:
        revision = api.stored(ServiceRevision, f"{api.one(Service, name).id}.1")
        assert api.sealer.open(revision.sealed_registry_auth) == wanted[name].encode()
    with pytest.raises(errors.Invalid, match="not the base64 form"):
        await api.control.deploy_stack(
            DeployStackRequest(spec=spec, registry_auths={"app_web": "%%%"}), CONTEXT
        )
