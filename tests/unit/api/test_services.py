"""Services: creating, updating, rolling back, removing."""

from __future__ import annotations

import asyncio
import base64

import pytest

from swarm import errors
from swarm.v1 import (
    ConfigReference,
    EndpointSpec,
    FileTarget,
    Global,
    Kind,
    NetworkAttachmentSpec,
    Replicated,
    ReplicatedJob,
    SecretReference,
    Service,
    ServiceMode,
    ServiceRevision,
    TaskState,
    UpdateConfig,
    UpdateState,
    UpdateStatus,
)
from tests.unit.api.harness import Api, changed, config, network, port, secret, service, task

AUTH = base64.b64encode(b'{"username":"u","password":"p"}').decode()


async def test_new_service_has_first_revision_and_one_replica(api: Api):
    id_ = await api.create(service=service())
    made = api.stored(Service, id_)
    assert (made.spec_version, made.task_version, made.previous_spec_version) == (1, 1, 0)
    assert made.spec.mode == ServiceMode(replicated=Replicated(replicas=1))
    assert api.stored(ServiceRevision, f"{id_}.1").spec == made.spec


async def test_name_that_is_taken_is_a_conflict(api: Api):
    await api.create(service=service("web"))
    with pytest.raises(errors.Conflict, match='service "web" exists already'):
        await api.create(service=service("web"))


async def test_of_two_creates_at_once_of_one_name_one_wins(api: Api):
    results = await asyncio.gather(
        *(api.create(service=service("web")) for _ in range(5)), return_exceptions=True
    )
    assert sum(isinstance(r, str) for r in results) == 1
    assert sum(isinstance(r, errors.Conflict) for r in results) == 4


async def test_creates_at_once_never_share_a_port(api: Api):
    await asyncio.gather(
        *(api.create(service=service(f"s{i}", ports=[port(0)])) for i in range(20))
    )
    ports = [s.endpoint.ports[0].published_port for s in api.all(Service)]
    assert sorted(ports) == list(range(30000, 30020))


async def test_port_of_another_service_names_it(api: Api):
    id_ = await api.create(service=service("a", ports=[port(8080)]))
    with pytest.raises(errors.Invalid) as caught:
        await api.create(service=service("b", ports=[port(8080)]))
    assert caught.value.message == (
        'service "b": ports[0].published: port 8080/tcp is already in use by service "a" '
        f"({id_}) as a published port; choose another"
    )


async def test_chosen_port_stays_over_updates_and_can_be_given_up(api: Api):
    await api.create(service=service("a", ports=[port(0)]))
    await api.create(service=service("b", ports=[port(0)]))
    b = api.one(Service, "b")
    await api.update(b, service=service("b", ports=[port(0)], labels={"x": "1"}))
    assert api.one(Service, "b").endpoint.ports == (port(30001),)
    await api.update(api.one(Service, "b"), service=service("b"))
    assert api.one(Service, "b").endpoint is None
    await api.create(service=service("c", ports=[port(30001)]))


async def test_references_are_resolved_by_name_and_stored_by_id(api: Api):
    key = await api.create(secret=secret("key"))
    conf = await api.create(config=config("conf"))
    net = await api.create(network=network("net"))
    await api.create(
        service=service(
            container={
                "secrets": (SecretReference(secret_name="key"),),
                "configs": (ConfigReference(config_name="conf"),),
            },
            task={"networks": (NetworkAttachmentSpec(target="net"),)},
        )
    )
    made = api.one(Service, "web").spec.task
    assert made.networks[0].target == net
    assert made.container.secrets == (
        SecretReference(
            secret_id=key,
            secret_name="key",
            file=FileTarget(name="key", uid="0", gid="0", mode=0o444),
        ),
    )
    assert made.container.configs[0].config_id == conf
    assert made.container.configs[0].file.name == "/conf"


# ---------------------------------------------------------------- update


async def test_update_with_a_stale_version_says_where_it_is(api: Api):
    await api.create(service=service())
    old = api.one(Service, "web")
    await api.update(old, service=service(replicas=2))
    with pytest.raises(errors.Conflict) as caught:
        await api.update(old, service=service(replicas=3))
    now = api.one(Service, "web")
    assert caught.value.message == (
        f'update out of sequence: service "web" is at version {now.meta.version}, the update is '
        f"based on version {old.meta.version}: it was changed meanwhile; read it again and repeat "
        "the change"
    )
    assert now.spec.mode.replicated.replicas == 2


async def test_of_updates_at_once_from_one_version_one_wins(api: Api):
    await api.create(service=service())
    old = api.one(Service, "web")
    results = await asyncio.gather(
        *(api.update(old, service=service(replicas=i)) for i in range(2, 7)),
        return_exceptions=True,
    )
    assert sum(isinstance(r, int) for r in results) == 1
    assert sum(isinstance(r, errors.Conflict) for r in results) == 4
    assert api.one(Service, "web").spec_version == 2


async def test_missing_version_is_invalid(api: Api):
    await api.create(service=service())
    made = api.one(Service, "web")
    with pytest.raises(errors.Invalid, match="the version that the update is based on is missing"):
        await api.update(changed(made, meta=changed(made.meta, version=0)), service=service())


async def test_update_without_a_change_changes_nothing(api: Api):
    await api.create(service=service())
    before = api.store.revision
    old = api.one(Service, "web")
    assert await api.update(old, service=service()) == old.meta.version
    assert api.store.revision == before


async def test_update_without_a_change_takes_a_paused_roll_out_up_again(api: Api):
    await api.create(service=service())
    old = api.one(Service, "web")
    await api.put(changed(old, update_status=UpdateStatus(state=UpdateState.PAUSED)))
    await api.update(api.one(Service, "web"), service=service())
    now = api.one(Service, "web")
    assert now.update_status is None
    assert now.spec_version == 1


@pytest.mark.parametrize(
    "state", [UpdateState.ROLLBACK_STARTED, UpdateState.ROLLBACK_COMPLETED], ids=["going", "done"]
)
async def test_what_a_rollback_led_to_is_no_rollback_once_it_is_asked_for(
    api: Api, state: UpdateState
):
    await api.create(service=service())
    old = api.one(Service, "web")
    await api.put(
        changed(old, update_status=UpdateStatus(state=state, message="update rolled back"))
    )
    await api.update(api.one(Service, "web"), service=service())
    now = api.one(Service, "web")
    assert (now.update_status, now.spec_version, now.task_version) == (None, 1, 1)
    await api.update(now, service=service())
    assert api.one(Service, "web") == now


TEMPLATE_KEPT = {
    "replicas": service(replicas=5),
    "labels": service(labels={"a": "b"}),
    "update config": service(update=UpdateConfig(parallelism=3)),
    "another published port": service(ports=[port(9090, target=80)]),
}
TEMPLATE_CHANGED = {
    "image": service(container={"image": "nginx:2"}, ports=[port(8080)]),
    "force": service(task={"force_update": 1}, ports=[port(8080)]),
    "another target port": service(ports=[port(8080, target=81)]),
    "host port": service(ports=[port(8080, publish_mode="host")]),
}


@pytest.mark.parametrize("after", TEMPLATE_KEPT.values(), ids=TEMPLATE_KEPT)
async def test_change_that_tasks_do_not_feel_keeps_the_task_version(api: Api, after):
    before = service(ports=[port(8080)] if after.endpoint else [])
    await api.create(service=changed(before, endpoint=after.endpoint and before.endpoint))
    status = UpdateStatus(state=UpdateState.COMPLETED)
    await api.put(changed(api.one(Service, "web"), update_status=status))
    await api.update(api.one(Service, "web"), service=after)
    now = api.one(Service, "web")
    assert (now.spec_version, now.task_version, now.previous_spec_version) == (2, 1, 1)
    assert now.update_status == status


@pytest.mark.parametrize("after", TEMPLATE_CHANGED.values(), ids=TEMPLATE_CHANGED)
async def test_change_of_the_template_moves_the_task_version_and_clears_the_status(api: Api, after):
    await api.create(service=service(ports=[port(8080)]))
    status = UpdateStatus(state=UpdateState.COMPLETED)
    await api.put(changed(api.one(Service, "web"), update_status=status))
    await api.update(api.one(Service, "web"), service=after)
    now = api.one(Service, "web")
    assert (now.spec_version, now.task_version) == (2, 2)
    assert now.update_status is None
    assert api.stored(ServiceRevision, f"{now.id}.1") is not None
    assert api.stored(ServiceRevision, f"{now.id}.2").spec == now.spec


async def test_rename_is_not_supported(api: Api):
    await api.create(service=service("web"))
    with pytest.raises(errors.Unsupported, match="renaming services is not supported"):
        await api.update(api.one(Service, "web"), service=service("other"))


async def test_mode_change_is_not_allowed(api: Api):
    await api.create(service=service())
    with pytest.raises(errors.Unsupported, match="service mode change is not allowed"):
        await api.update(
            api.one(Service, "web"), service=service(mode=ServiceMode(global_service=Global()))
        )


async def test_job_runs_again_only_for_a_new_template(api: Api):
    mode = ServiceMode(replicated_job=ReplicatedJob(total_completions=3))
    await api.create(service=service(mode=mode))
    await api.update(api.one(Service, "web"), service=service(mode=mode, labels={"a": "b"}))
    assert api.one(Service, "web").job_iteration == 0
    await api.update(api.one(Service, "web"), service=service(mode=mode, task={"force_update": 1}))
    assert api.one(Service, "web").job_iteration == 1


# ---------------------------------------------------------------- rollback


async def test_rollback_goes_back_and_forth(api: Api):
    await api.create(service=service())
    first = api.one(Service, "web").spec
    await api.update(api.one(Service, "web"), service=service(container={"image": "nginx:2"}))
    second = api.one(Service, "web").spec
    await api.update(api.one(Service, "web"), rollback=True)
    now = api.one(Service, "web")
    assert now.spec == first
    assert (now.spec_version, now.task_version, now.previous_spec_version) == (3, 3, 2)
    assert now.update_status.state == UpdateState.ROLLBACK_STARTED
    assert now.update_status.message == "manually requested rollback"
    await api.update(now, rollback=True)
    assert api.one(Service, "web").spec == second


async def test_rollback_of_what_was_never_updated(api: Api):
    await api.create(service=service())
    with pytest.raises(errors.Invalid, match="does not have a previous spec"):
        await api.update(api.one(Service, "web"), rollback=True)


async def test_rollback_to_a_port_that_another_service_has_by_now(api: Api):
    await api.create(service=service(ports=[port(8080)]))
    await api.update(api.one(Service, "web"), service=service(ports=[port(8081)]))
    await api.create(service=service("other", ports=[port(8080)]))
    before = api.one(Service, "web")
    with pytest.raises(errors.Conflict, match='port 8080/tcp is already in use by service "other"'):
        await api.update(before, rollback=True)
    assert api.one(Service, "web") == before


# ---------------------------------------------------------------- credentials


async def test_credentials_are_sealed_and_follow_the_service(api: Api):
    id_ = await api.create(auth=AUTH, service=service())
    first = api.stored(ServiceRevision, f"{id_}.1")
    assert api.sealer.open(first.sealed_registry_auth) == AUTH.encode()
    await api.update(api.one(Service, "web"), service=service(container={"image": "nginx:2"}))
    second = api.stored(ServiceRevision, f"{id_}.2")
    assert second.sealed_registry_auth == first.sealed_registry_auth
    answer = await api.get(Kind.SERVICE, "web")
    assert answer.revision.spec_version == 1
    assert answer.revision.sealed_registry_auth == b""


async def test_new_credentials_alone_make_no_new_tasks(api: Api):
    id_ = await api.create(service=service())
    await api.update(api.one(Service, "web"), auth=AUTH, service=service())
    assert api.one(Service, "web").spec_version == 1
    sealed = api.stored(ServiceRevision, f"{id_}.1").sealed_registry_auth
    assert api.sealer.open(sealed) == AUTH.encode()
    before = api.store.revision
    await api.update(api.one(Service, "web"), auth=AUTH, service=service())
    assert api.store.revision == before, "the same credentials are no change"


@pytest.mark.parametrize("auth", ["%%%", base64.b64encode(b"[1]").decode(), "bm90IGpzb24="])
async def test_credentials_of_another_form_are_refused(api: Api, auth: str):
    with pytest.raises(errors.Invalid, match="not the base64 form of Docker's auth JSON"):
        await api.create(auth=auth, service=service())


# ---------------------------------------------------------------- removal


async def test_removal_is_asked_for_and_nothing_else_can_be_done_then(api: Api):
    id_ = await api.create(service=service())
    assert await api.remove(Kind.SERVICE, "web") == id_
    assert api.one(Service, "web").pending_delete
    revision = api.store.revision
    assert await api.remove(Kind.SERVICE, "web") == id_
    assert api.store.revision == revision, "asking again changes nothing"
    with pytest.raises(errors.Conflict, match="is being removed"):
        await api.update(api.one(Service, "web"), service=service(replicas=2))


async def test_create_waits_until_the_old_service_is_gone(api: Api):
    await api.create(service=service())
    await api.remove(Kind.SERVICE, "web")
    old = api.one(Service, "web")
    creating = asyncio.create_task(api.create(service=service()))
    await asyncio.sleep(0)
    await api.drop(old)
    assert await creating != old.id


async def test_create_does_not_wait_for_ever(hasty: Api):
    await hasty.create(service=service())
    await hasty.remove(Kind.SERVICE, "web")
    with pytest.raises(errors.Conflict, match='service "web" is still being removed'):
        await hasty.create(service=service())


async def test_port_of_a_service_on_its_way_out_can_be_had(api: Api):
    await api.create(service=service("a", ports=[port(8080)]))
    await api.remove(Kind.SERVICE, "a")
    await api.create(service=service("b", ports=[port(8080)]))


async def test_unknown_service(api: Api):
    with pytest.raises(errors.NotFound, match="service nope not found"):
        await api.remove(Kind.SERVICE, "nope")


# ---------------------------------------------------------------- faults


async def test_a_commit_that_fails_leaves_nothing(api: Api):
    await api.create(service=service())
    before = (api.store.revision, api.all(Service))
    api.engine.failing = errors.Unavailable("disk is full; free some space")
    with pytest.raises(errors.Unavailable, match="disk is full"):
        await api.create(service=service("b"))
    with pytest.raises(errors.Unavailable, match="disk is full"):
        await api.update(api.one(Service, "web"), service=service(replicas=9))
    api.engine.failing = None
    assert (api.store.revision, api.all(Service)) == before
    await api.create(service=service("b"))


async def test_secret_of_tasks_that_still_run_an_earlier_spec_is_in_use(api: Api):
    await api.create(secret=secret("key"))
    uses = {"secrets": (SecretReference(secret_name="key"),)}
    await api.create(service=service(container=uses))
    await api.put(task("t1", api.one(Service, "web")))
    await api.update(api.one(Service, "web"), service=service())
    with pytest.raises(errors.Conflict, match="tasks of an earlier spec still run"):
        await api.remove(Kind.SECRET, "key")
    await api.put(task("t1", api.one(Service, "web"), state=TaskState.SHUTDOWN, spec_version=1))
    await api.remove(Kind.SECRET, "key")


async def test_process_runtime_needs_no_image(api: Api):
    spec = service(task={"runtime": "process"}, container={"image": "", "args": ("sleep", "1")})
    await api.create(service=spec)


async def test_empty_endpoint_is_given_back_as_it_was(api: Api):
    await api.create(service=service(endpoint=EndpointSpec(mode="vip")))
    assert api.one(Service, "web").endpoint.spec == EndpointSpec(mode="vip")
