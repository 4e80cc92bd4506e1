"""Versions of services: what is kept, shown and gone back to; paused updates that go on."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from manager.api.leftovers import finish
from manager.control import versions
from manager.store import Draft
from swarm import errors
from swarm.v1 import (
    GetServiceHistoryRequest,
    GetServiceHistoryResponse,
    Kind,
    Network,
    NetworkAttachmentSpec,
    PortConfig,
    Replicated,
    ReplicatedJob,
    ResumeUpdateRequest,
    RotateRequest,
    Secret,
    SecretReference,
    Service,
    ServiceMode,
    ServiceRevision,
    ServiceSpec,
    Spec,
    TaskState,
    UpdateRequest,
    UpdateState,
    UpdateStatus,
)
from tests.unit.api.harness import CONTEXT, Api, changed, network, port, secret, service, task

U = UpdateState


def web(image: str, **fields: Any) -> ServiceSpec:
    return service(container={"image": image}, **fields)


async def updated(api: Api, spec: ServiceSpec) -> Any:
    await api.update(api.one(Service, "web"), service=spec)
    await tidy(api)
    return api.one(Service, "web")


async def tidy(api: Api) -> None:
    """What the control loop does with versions, with no tasks."""

    def keep(draft: Draft) -> None:
        for found in list(draft.all(Service)):
            versions.keep_versions(draft, found.id, set())

    await api.store.update(keep)


async def history(api: Api) -> GetServiceHistoryResponse:
    return await api.control.get_service_history(GetServiceHistoryRequest(service="web"), CONTEXT)


async def roll_back(api: Api, to: int = 0, **fields: Any) -> Any:
    web = api.one(Service, "web")
    await api.control.update(
        UpdateRequest(
            kind=Kind.SERVICE,
            id=web.id,
            version=web.meta.version,
            rollback=True,
            rollback_to=to,
            **fields,
        ),
        CONTEXT,
    )
    return api.one(Service, "web")


def numbers(api: Api) -> list[int]:
    return sorted(r.spec_version for r in api.all(ServiceRevision))


async def rolling(api: Api, state: UpdateState, **fields: Any) -> None:
    status = UpdateStatus(state=state, started_at_ns=1, message="told", **fields)
    await api.put(changed(api.one(Service, "web"), update_status=status))


# ---------------------------------------------------------------- what is kept


async def test_of_what_needs_no_new_tasks_only_the_newest_version_is_kept(api: Api):
    await api.create(service=web("a"))
    for replicas in (2, 3, 4):
        await updated(api, web("a", replicas=replicas))
    now = await updated(api, web("b", replicas=4))
    assert (now.spec_version, now.task_version, now.previous_spec_version) == (5, 5, 4)
    assert numbers(api) == [4, 5]
    assert [r.task_version for r in api.all(ServiceRevision)] == [1, 5]


async def test_as_many_templates_are_kept_as_may_be_gone_back_to(api: Api):
    await api.create(service=web("a0"))
    for i in range(1, 14):
        await updated(api, web(f"a{i}"))
    assert numbers(api) == list(range(5, 15))


async def test_versions_of_an_older_store_are_told_apart_by_their_specs(api: Api):
    await api.create(service=web("a"))
    for spec in (web("a", replicas=2), web("b"), web("b", replicas=3)):
        await api.update(api.one(Service, "web"), service=spec)
    await api.put(*(changed(r, task_version=0, who="") for r in api.all(ServiceRevision)))
    await tidy(api)
    assert numbers(api) == [2, 3, 4]
    now = await updated(api, web("c"))
    assert (now.spec_version, numbers(api)) == (5, [2, 4, 5])
    shown = (await history(api)).versions
    assert [v.revision.task_version for v in shown if v.revision] == [5, 4, 2]


async def test_who_made_a_version_is_noted_wherever_one_is_made(api: Api):
    await api.create(secret=secret())
    used = {"image": "a", "secrets": (SecretReference(secret_name="key"),)}
    await api.create(service=service(container=used))
    request = RotateRequest(kind=Kind.SECRET, ref="key", data=b"new")
    await api.control.rotate(request, CONTEXT)
    await roll_back(api)
    entries = sorted(api.all(ServiceRevision), key=lambda r: r.spec_version)
    assert [(r.who, r.task_version, r.rollback_to) for r in entries] == [
        (str(CONTEXT.identity), 1, 0),
        (str(CONTEXT.identity), 2, 0),
        (str(CONTEXT.identity), 3, 1),
    ]


# ---------------------------------------------------------------- what is shown


async def test_the_history_says_what_each_version_changed_and_what_runs_it(api: Api):
    await api.create(network=network("front"))
    on_front = {"networks": (NetworkAttachmentSpec(target="front"),)}
    await api.create(service=web("a"))
    await updated(api, web("b", replicas=3, task=on_front))
    now = await updated(api, web("b", replicas=5, task=on_front))
    await api.put(
        task("t1", now, 1, spec_version=1),
        task("t2", now, 2, spec_version=2),
        task("t3", now, 3, spec_version=3),
        task("t4", now, 4, spec_version=3, state=TaskState.PREPARING),
    )
    answer = await history(api)
    assert answer.service is not None and answer.service.spec_version == 3
    told = [
        (
            v.revision.spec_version if v.revision else 0,
            v.tasks,
            v.previous,
            {c.path: (c.before, c.after) for c in v.changes},
        )
        for v in answer.versions
    ]
    assert told == [
        (3, 1, False, {"mode.replicated.replicas": ("3", "5")}),
        (
            2,
            1,
            True,
            {
                "mode.replicated.replicas": ("1", "3"),
                "task.container.image": ('"a"', '"b"'),
                "task.networks[front]": (None, '{"target":"front"}'),
            },
        ),
        (1, 1, False, {}),
    ]


async def test_the_history_shows_no_credentials_and_no_content(api: Api):
    await api.create(secret=secret(data=b"one"))
    used = {"image": "a", "secrets": (SecretReference(secret_name="key"),)}
    await api.create(auth="eyJ1c2VybmFtZSI6InUifQ==", service=service(container=used))
    await api.control.rotate(RotateRequest(kind=Kind.SECRET, ref="key", data=b"two"), CONTEXT)
    answer = await history(api)
    assert all(v.revision and not v.revision.sealed_registry_auth for v in answer.versions)
    (only,) = answer.versions[0].changes
    assert only.path == "task.container.secrets[/run/secrets/key].data"
    assert only.before and only.after and only.before != only.after


# ---------------------------------------------------------------- going back


async def test_a_rollback_to_a_version_makes_it_the_next_one(api: Api):
    await api.create(service=web("a"))
    for image in ("b", "c", "d"):
        await updated(api, web(image))
    now = await roll_back(api, 2)
    assert now.spec.task.container.image == "b"
    assert (now.spec_version, now.task_version, now.previous_spec_version) == (5, 5, 4)
    assert now.update_status.state == U.ROLLBACK_STARTED
    back = await roll_back(api, 4)
    assert back.spec.task.container.image == "d"


async def test_a_version_that_is_not_kept_is_told_with_those_that_are(api: Api):
    await api.create(service=web("a"))
    await updated(api, web("b"))
    await updated(api, web("c"))
    with pytest.raises(errors.NotFound, match=r"has no version 9 to go back to; kept are 1 and 2"):
        await roll_back(api, 9)
    with pytest.raises(errors.Conflict, match="is at version 3 already"):
        await roll_back(api, 3)


async def test_only_a_rollback_names_a_version(api: Api):
    await api.create(service=web("a"))
    now = api.one(Service, "web")
    request = UpdateRequest(
        kind=Kind.SERVICE,
        id=now.id,
        version=now.meta.version,
        rollback_to=1,
        spec=Spec(service=web("b")),
    )
    with pytest.raises(errors.Invalid, match="no rollback"):
        await api.control.update(request, CONTEXT)


async def test_what_a_version_used_and_is_gone_is_told_all_at_once(api: Api):
    await api.create(secret=secret("key"))
    await api.create(network=network("front"))
    used = {"image": "a", "secrets": (SecretReference(secret_name="key"),)}
    on_front = {"networks": (NetworkAttachmentSpec(target="front"),)}
    await api.create(service=service(container=used, task=on_front, ports=[port(8080)]))
    await updated(api, web("b"))
    await api.create(service=service("other", ports=[port(8080)]))
    await api.remove(Kind.SECRET, "key")
    await api.remove(Kind.NETWORK, "front")
    before = api.one(Service, "web")
    with pytest.raises(errors.Conflict) as refused:
        await roll_back(api)
    said = refused.value.message
    assert said.startswith('service "web" cannot go back to version 1: ')
    assert 'secret "key", which it uses, was removed' in said
    assert "network " in said
    assert 'port 8080/tcp is already in use by service "other"' in said
    assert api.one(Service, "web") == before


async def test_secrets_of_kept_versions_stay_and_are_gone_back_to(api: Api):
    await api.create(secret=secret(data=b"1"))
    used = {"image": "a", "secrets": (SecretReference(secret_name="key"),)}
    await api.create(service=service(container=used))
    first = api.one(Service, "web").spec
    for data in (b"2", b"3"):
        await api.control.rotate(RotateRequest(kind=Kind.SECRET, ref="key", data=data), CONTEXT)
        await tidy(api)
    await api.store.update(finish)
    assert len(api.all(Secret)) == 3
    now = await roll_back(api, 1)
    assert now.spec == first
    for i in range(versions.VERSIONS_MAX):
        await updated(api, service(container={**used, "image": f"b{i}"}))
    await api.store.update(finish)
    assert len(api.all(Secret)) == 1, "nothing can come back to the others"


@pytest.mark.parametrize("state", [U.UPDATING, U.PAUSED])
async def test_a_rollback_out_of_an_update_leads_before_it_also_where_it_was_scaled(
    api: Api, state: UpdateState
):
    await api.create(service=web("a", replicas=2))
    await updated(api, web("b", replicas=2))
    await rolling(api, state)
    await updated(api, web("b", replicas=6))
    shown = (await history(api)).versions
    assert [(v.revision.spec_version, v.previous) for v in shown if v.revision] == [
        (3, False),
        (1, True),
    ]
    now = await roll_back(api)
    assert now.spec.task.container.image == "a"
    assert now.spec.mode == ServiceMode(replicated=Replicated(replicas=6))
    entry = api.stored(ServiceRevision, f"{now.id}.{now.spec_version}")
    assert entry.rollback_to == 1


@pytest.mark.parametrize("state", [U.UPDATING, U.PAUSED])
async def test_a_rollback_out_of_an_update_passes_over_versions_that_were_never_through(
    api: Api, state: UpdateState
):
    await api.create(service=web("a", replicas=2))
    await updated(api, web("b", replicas=2))
    await rolling(api, state)
    await updated(api, web("b", replicas=6))
    await updated(api, web("c", replicas=6))
    await rolling(api, state)
    assert [v.previous for v in (await history(api)).versions] == [False, False, True]
    now = await roll_back(api)
    assert now.spec.task.container.image == "a"
    # Who scaled it in the middle does not mean to go back to the middle.
    assert now.spec.mode == ServiceMode(replicated=Replicated(replicas=6))


async def test_a_version_that_was_through_or_gone_back_to_is_not_passed_over(api: Api):
    await api.create(service=web("a"))
    await updated(api, web("b"))
    await rolling(api, U.COMPLETED)
    await updated(api, web("c"))
    await rolling(api, U.UPDATING)
    assert (await roll_back(api)).spec.task.container.image == "b"
    # This rollback is not through either, and leads to what was.
    await updated(api, web("d"))
    await rolling(api, U.UPDATING)
    now = await roll_back(api)
    assert now.spec.task.container.image == "b"
    assert api.stored(ServiceRevision, f"{now.id}.{now.spec_version}").rollback_to == 4


async def test_where_none_was_through_a_rollback_goes_back_one(api: Api):
    await api.create(service=web("a"))
    await rolling(api, U.UPDATING)
    await updated(api, web("b"))
    await rolling(api, U.UPDATING)
    await updated(api, web("c"))
    await rolling(api, U.UPDATING)
    assert (await roll_back(api)).spec.task.container.image == "b"


async def test_a_rollback_of_a_service_at_rest_takes_back_its_last_change(api: Api):
    await api.create(service=web("a", replicas=2))
    await updated(api, web("b", replicas=2))
    await rolling(api, U.COMPLETED)
    await updated(api, web("b", replicas=6))
    now = await roll_back(api)
    assert now.spec.task.container.image == "b"
    assert now.spec.mode == ServiceMode(replicated=Replicated(replicas=2))


async def test_ports_that_the_cluster_chose_stay_through_a_rollback(api: Api):
    open_port = PortConfig(target_port=80)
    await api.create(service=web("a", ports=[open_port]))
    before = api.one(Service, "web").endpoint
    await updated(api, web("b", ports=[open_port]))
    assert (await roll_back(api)).endpoint == before


# ---------------------------------------------------------------- pausing and resuming


async def pausing(api: Api, spec: ServiceSpec, after: int) -> tuple[Any, tuple[str, ...]]:
    now = api.one(Service, "web")
    response = await api.control.update(
        UpdateRequest(
            kind=Kind.SERVICE,
            id=now.id,
            version=now.meta.version,
            spec=Spec(service=spec),
            pause_after=after,
        ),
        CONTEXT,
    )
    return api.one(Service, "web"), response.warnings


async def test_an_update_may_be_asked_to_pause(api: Api):
    await api.create(service=web("a", replicas=3))
    now, warnings = await pausing(api, web("b", replicas=3), 2)
    assert (now.update_status.state, now.update_status.pause_after) == (U.UPDATING, 2)
    assert warnings == ()
    later, warnings = await pausing(api, web("b", replicas=3, labels={"a": "b"}), 1)
    assert later.update_status == structs.replace(now.update_status, pause_after=1)


async def test_who_asks_to_pause_where_nothing_is_replaced_is_told(api: Api):
    await api.create(service=web("a", replicas=3))
    now, (warning,) = await pausing(api, web("a", replicas=4), 2)
    assert now.update_status is None
    assert "has nothing to pause" in warning


async def test_only_services_pause(api: Api):
    await api.create(network=network("front"))
    front = api.one(Network, "front")
    with pytest.raises(errors.Invalid, match="only updates of services can be paused"):
        await api.control.update(
            UpdateRequest(
                kind=Kind.NETWORK,
                id=front.id,
                version=front.meta.version,
                spec=Spec(network=network("front")),
                pause_after=1,
            ),
            CONTEXT,
        )


async def test_a_job_does_not_pause(api: Api):
    job = ServiceMode(replicated_job=ReplicatedJob(total_completions=1))
    await api.create(service=web("a", mode=job))
    with pytest.raises(errors.Invalid, match="is a job"):
        await pausing(api, web("b", mode=job), 1)


async def resume(api: Api, **fields: Any) -> Any:
    response = await api.control.resume_update(
        ResumeUpdateRequest(service="web", **fields), CONTEXT
    )
    now = api.one(Service, "web")
    assert response.version == now.meta.version
    return now


@pytest.mark.parametrize(
    ("state", "goes_on"),
    [(U.PAUSED, U.UPDATING), (U.ROLLBACK_PAUSED, U.ROLLBACK_STARTED)],
    ids=["update", "rollback"],
)
async def test_a_paused_roll_out_goes_on_and_forgets_its_failures(
    api: Api, state: UpdateState, goes_on: UpdateState
):
    await api.create(service=web("a"))
    await rolling(api, state, awaits_resume=True, pause_after=1, progress_at_ns=2, done=1)
    now = await resume(api, pause_after=3)
    status = now.update_status
    assert (status.state, status.awaits_resume, status.pause_after) == (goes_on, False, 3)
    assert status.resumed_at_ns == api.clock.now_ns()
    assert status.started_at_ns == 1
    # However long it was paused, its deadline begins anew.
    assert (status.progress_at_ns, status.done) == (0, 0)


async def test_what_is_not_paused_is_not_resumed(api: Api):
    await api.create(service=web("a"))
    with pytest.raises(errors.Conflict, match="has no paused update to resume: it has no update"):
        await resume(api)
    await rolling(api, U.UPDATING)
    with pytest.raises(errors.Conflict, match="its update is in progress"):
        await resume(api)


async def test_who_resumes_another_version_than_was_seen_is_told(api: Api):
    await api.create(service=web("a"))
    await rolling(api, U.PAUSED)
    with pytest.raises(errors.Conflict, match="look at it again"):
        await resume(api, version=1_000)
